"""What a node finds out about itself, against real files, ports and programs; nvidia-smi is a stand-in."""

import http.server
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import load_config
from fipo_megatron.preflight import __main__ as program
from fipo_megatron.preflight.all_reduce import AllReducePlan, measure
from fipo_megatron.preflight.examination import SharedDirectory
from fipo_megatron.preflight.gathering import gathering_port
from fipo_megatron.preflight.gpu_state import gpu_facts, xid_errors
from fipo_megatron.preflight.greeter import Greeter, greet
from fipo_megatron.preflight.input_access import input_facts, needed_bytes
from fipo_megatron.preflight.installed_versions import server_versions, trainer_versions
from fipo_megatron.preflight.neighbours import examine_neighbours
from fipo_megatron.preflight.node_facts import NodeFacts
from fipo_megatron.preflight.node_names import expand, names_of_ranks
from fipo_megatron.preflight.port_state import port_states, unresolved_urls
from fipo_megatron.preflight.time_limit import finished_in_time
from tests.preflight.nodes import free_port, write_inputs


@pytest.fixture
def config_file(tmp_path):
    return write_inputs(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,7],gpu", ["n1", "n2", "n3", "n7", "gpu"]),
        ("node[008-011]", ["node008", "node009", "node010", "node011"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
    ],
)
def test_node_lists(text, names):
    assert expand(text) == names


def test_names_of_ranks_need_one_task_per_node():
    assert names_of_ranks({"SLURM_STEP_NODELIST": "n[1-2]"}, 2) == {0: "n1", 1: "n2"}
    assert names_of_ranks({"SLURM_STEP_NODELIST": "n[1-2]"}, 16) == {}
    assert names_of_ranks({}, 2) == {}


def test_ranks_of_a_step_over_two_components_are_numbered_component_by_component():
    """As Slurm 22.05 set the variables of such a step."""
    environment = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n4",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]",
        "SLURM_STEP_NODELIST": "n[1-2,4]",
    }
    assert names_of_ranks(environment, 3) == {0: "n4", 1: "n1", 2: "n2"}
    assert names_of_ranks(environment | {"SLURM_STEP_NODELIST": "n4"}, 1) == {0: "n4"}


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program into PATH that prints the given rows."""

    def write(text, code=0):
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return write


def test_gpus_as_the_driver_lists_them(nvidia_smi, tmp_path):
    nvidia_smi(
        "0, NVIDIA H100 80GB HBM3, 580.82.07, 0, No, No, [N/A], 81559\n"
        "1, NVIDIA H100 80GB HBM3, 580.82.07, 2, Yes, No, [N/A], 81559\n"
        "2, NVIDIA H100 80GB HBM3, 580.82.07, [N/A], 0, 1, 0, [N/A]"
    )
    log = tmp_path / "kmsg"
    log.write_text("6,1,10,-;usb 1-1: new device\n")
    facts = gpu_facts(log)
    assert (facts.names, facts.driver) == (("NVIDIA H100 80GB HBM3",) * 3, "580.82.07")
    assert facts.memory == (81559 * 2**20,) * 2
    assert facts.errors == (
        "GPU 1 has 2 uncorrected memory errors since the driver was loaded",
        "GPU 1 has a memory remapping that waits for a reset",
        "GPU 2 could not remap a memory row",
    )
    assert facts.kernel_log == ()
    missing = gpu_facts(tmp_path / "none")
    assert (missing.kernel_log, missing.kernel_log_problem) == (None, f"{tmp_path}/none: No such file or directory")


def test_a_driver_that_fails_is_a_problem(nvidia_smi):
    nvidia_smi("No devices were found", code=6)
    assert gpu_facts().problem == "nvidia-smi ended with 6: No devices were found"


def test_xid_errors_of_the_hardware_count_for_a_day():
    day = 86400 * 10**6
    log = (
        f"4,100,{3 * day},-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off\n"
        f"4,101,{3 * day},-;NVRM: Xid (PCI:0000:3b:00): 31, pid=77, name=python, MMU fault\n"
        f"4,102,{1 * day},-;NVRM: Xid (PCI:0000:5e:00): 48, pid=77, name=python, DBE\n"
    )
    assert list(xid_errors(log, uptime=3 * 86400 + 1800)) == [
        "PCI:0000:3b:00 had Xid 79 (the GPU has fallen off the bus) 0.5 hours ago"
    ]


@pytest.mark.processes
def test_the_plan_is_compared_with_the_gpus(nvidia_smi, config_file, monkeypatch, capsys):
    """Torch is told that it has two GPUs, of 16 MiB; nothing is computed on them."""
    row = "NVIDIA H100 80GB HBM3, 580.82.07, 0, No, No, [N/A], 16"
    nvidia_smi(f"0, {row}\n1, {row}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("fipo_megatron.preflight.installed_versions.trainer_version", lambda: "2.30.7")
    assert program.main([str(config_file), "--min-bandwidth", "0", "run.steps=1"]) == 1
    said = capsys.readouterr().out
    assert " of 0.0 GiB" in said.splitlines()[1]
    assert "job: stage 0: " in said


def test_versions_are_those_of_the_installed_packages_and_sources():
    versions = trainer_versions()
    assert versions["python"] == sys.version.split()[0]
    assert torch.__version__.startswith(versions["torch"])
    assert len(versions["sources of fipo_megatron"]) == 12
    assert ("NCCL" in versions) == torch.cuda.is_available()


def test_servers_environment(config_file, tmp_path):
    assert server_versions(load_config(config_file)) == ({}, "")
    absent = load_config(config_file, ["rollout.engine=sglang", f"rollout.servers.python={tmp_path}/python"])
    versions, problem = server_versions(absent)
    assert versions == {}
    assert problem.startswith(f"rollout.servers.python = {tmp_path}/python: {tmp_path}/python: No such file")
    elsewhere = load_config(
        config_file,
        [
            "rollout.engine=sglang",
            f"rollout.servers.python={tmp_path}/python",
            "rollout.servers.urls=[http://n9:30000]",
        ],
    )
    assert server_versions(elsewhere) == ({}, "")
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"python": "3.12.1", "sglang": "0.5.23"}'\n""")
    python.chmod(0o755)
    assert server_versions(absent) == ({"python": "3.12.1", "sglang": "0.5.23"}, "")


def test_inputs_are_compared_by_names_and_sizes(config_file, tmp_path):
    config = load_config(config_file)
    model, data = input_facts(config)
    assert (model.problem, data.problem) == ("", "")
    assert model.size == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    assert input_facts(config)[0].digest != model.digest
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "data.jsonl").symlink_to("/proc/self/mem")  # can be opened, but not read
    assert input_facts(config)[1].problem == f"{tmp_path}/data.jsonl cannot be read: Input/output error"
    (tmp_path / "data.jsonl").unlink()
    assert input_facts(config)[1].problem == f"{tmp_path}/data.jsonl cannot be read: No such file or directory"
    (tmp_path / "model" / "config.json").unlink()
    assert "config.json cannot be read" in input_facts(config)[0].problem


def test_space_for_the_checkpoints_that_are_missing(config_file, tmp_path):
    config = load_config(config_file, ["checkpoint.keep_last=3", "actor.dtype=float32"])
    whole = needed_bytes(config)
    assert whole % (4 * 16) == 0  # three that are kept and one that is written; 16 bytes per parameter
    for step in range(1, 4):
        (tmp_path / "shared" / "run" / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    assert needed_bytes(config) == whole // 4
    assert needed_bytes(load_config(config_file, ["model.path=/none"])) is None


def test_the_master_port_must_be_free(config_file):
    config = load_config(config_file)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        states, problems = port_states(config, Launch(0, 2, 0, "n1", port), "n1")
        assert states == (f"{port} in use",)
        assert problems == (
            f"MASTER_PORT = {port}: is in use; it must be free for rank 0, set another one on all nodes",
        )
        assert port_states(config, Launch(1, 2, 0, "n1", port), "n2") == ((), ())
    assert port_states(config, Launch(0, 2, 0, "n1", port), "n1") == ((f"{port} free",), ())


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_ports_of_servers_are_free_or_serve(config_file):
    served = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    with served, socket.create_server(("", 0)) as taken:
        ports = (served.server_port, taken.getsockname()[1], free_port())
        urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        config = load_config(config_file, ["rollout.engine=sglang", f"rollout.servers.urls=[{urls}]"])
        states, problems = port_states(config, Launch(), "n1")
        served.shutdown()
    assert states == (f"{ports[0]} serves", f"{ports[1]} in use", f"{ports[2]} free")
    assert problems == (
        f"rollout.servers.urls: http://127.0.0.1:{ports[1]}: the port is in use and no server answers there; it must "
        "be free for the server, or a server must answer",
    )
    assert port_states(config, Launch(1, 2, 0, "n1", 29500), "n2") == ((), ())


def test_a_host_of_a_server_that_cannot_be_resolved(config_file):
    config = load_config(config_file, ["rollout.engine=sglang", "rollout.servers.urls=[http://no-such-host.invalid:1]"])
    (problem,) = unresolved_urls(config)
    assert problem.startswith("rollout.servers.urls: http://no-such-host.invalid:1: the host name cannot be resolved")


def test_greeting_tells_name_and_clock():
    with Greeter("n7") as greeter:
        answer = greet("127.0.0.1", greeter.port)
    assert answer.name == "n7"
    assert abs(answer.ahead) <= answer.error + 1e-3
    with pytest.raises(OSError):  # noqa: PT011 - the system chooses the text
        greet("127.0.0.1", greeter.port)


def test_another_program_at_the_port_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ValueError, match="another program answers at port"):
            greet("127.0.0.1", other.getsockname()[1])


def test_neighbours_are_examined_by_name_connection_and_file(tmp_path):
    shared = SharedDirectory(str(tmp_path), "token")
    assert shared.write(0) == ""
    host = socket.gethostname()
    with Greeter("n1") as greeter:
        nodes = [
            NodeFacts(0, "n1", host, greeter.port, output_file=str(shared.file(0))),
            NodeFacts(1, "n2", host, 1),
            NodeFacts(2, "n3", "no-such-host.invalid", 1),
            NodeFacts(3, "n4", host, greeter.port),  # its host name leads to n1
        ]
        facts = examine_neighbours(NodeFacts(4, "n5", host), nodes, "token")
    assert list(facts.unresolved) == [2, 3]
    assert facts.unresolved[3].endswith("which is n1")
    assert list(facts.unreachable) == [1]
    assert facts.invisible == {}
    assert abs(facts.clock_ahead) < 1


def test_a_file_of_another_content_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("fipo_megatron.preflight.neighbours._VISIBLE_SECONDS", 0.0)
    shared = SharedDirectory(str(tmp_path), "token")
    shared.write(0)
    nodes = [
        NodeFacts(0, "n1", "no-such-host.invalid", 1, output_file=str(shared.file(0))),
        NodeFacts(1, "n2", "no-such-host.invalid", 1, output_file=str(shared.file(1))),
    ]
    facts = examine_neighbours(NodeFacts(2, "n3", "h"), nodes, "another token")
    assert facts.invisible == {
        0: f"{shared.file(0)} has another content",
        1: f"{shared.file(1)}: No such file or directory",
    }
    with shared.cleaned(0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_the_nearest_that_exists(config_file, tmp_path):
    chosen = SharedDirectory.choose(load_config(config_file), "t")
    assert (chosen.path, chosen.problem) == (str(tmp_path / "shared"), "")
    (tmp_path / "shared" / "run").mkdir()
    (tmp_path / "shared" / "run" / "metrics.jsonl").touch()
    chosen = SharedDirectory.choose(load_config(config_file, ["checkpoint.resume=never"]), "t")
    assert chosen.path == str(tmp_path / "shared" / "run")
    assert "already holds a run" in chosen.problem


def test_the_port_of_the_reports_is_not_that_of_rank_0():
    assert gathering_port(Launch()) == 0
    assert gathering_port(Launch(0, 2, 0, "n1", 29500)) == 19500
    assert gathering_port(Launch(0, 2, 0, "n1", 5000)) == 15000


@pytest.mark.processes
def test_an_all_reduce_that_does_not_end_is_killed():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a store that never answers
        plan = AllReducePlan({0: 1, 1: 1}, 1.0, "127.0.0.1", silent.getsockname()[1], cuda=False, seconds=1.0)
        start = time.monotonic()
        facts = measure(plan, 0)
    assert facts.everywhere is None
    assert facts.problem
    assert time.monotonic() - start < 60


@pytest.mark.processes
def test_a_slow_all_reduce_is_repeated_in_parts():
    """Three nodes of one process each; the bandwidth that is asked for cannot be reached."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    plan = AllReducePlan({0: 1, 1: 1, 2: 1}, 1e9, "127.0.0.1", store.port, cuda=False, seconds=120.0)
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda node: measure(plan, node), range(3)))
    assert [facts.problem for facts in found] == [""] * 3
    assert len({facts.everywhere for facts in found}) == 1
    assert [sorted(facts.pairs) for facts in found] == [[1, 2], [0, 2], [0, 1]]
    assert found[0].pairs[1] == found[1].pairs[0] > 0


def test_nodes_of_one_name_are_told_apart():
    nodes = {0: NodeFacts(0, "vm", "vm"), 1: NodeFacts(1, "vm", "vm"), 2: NodeFacts(2, "n3", "n3")}
    assert program._names(3, nodes, {}) == {0: "vm-rank-0", 1: "vm-rank-1", 2: "n3"}


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["no-such.yaml"], {}, "no-such.yaml"),
        (["CONFIG", "run.steps=x"], {}, "run.steps"),
        (["CONFIG", "--rollout-nodes", "1"], {}, "--rollout-nodes 1: must be at least 0 and less than 1, all nodes"),
        (["CONFIG", "--json", "/no/such/directory/x"], {}, "--json /no/such/directory/x: there is no directory"),
        (
            ["CONFIG"],
            {
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_JOB_ID": "1",
                "MASTER_ADDR": "x",
            },
            "local rank 1: a preflight has one task per node; use srun --ntasks-per-node=1",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, environment, said, config_file, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert program.main([str(config_file) if one == "CONFIG" else one for one in arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_file_system_that_does_not_answer_is_named(config_file, tmp_path, capsys):
    """A pipe that nobody writes: opening it never ends."""
    (tmp_path / "data.jsonl").unlink()
    os.mkfifo(tmp_path / "data.jsonl")
    assert program.main([str(config_file), "--timeout", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[3] == (
        f"{socket.gethostname()}: report: has started but not reported, it was examining model and data "
        f"({tmp_path}/model); must report within 1 s (--timeout)"
    )
    os.close(os.open(tmp_path / "data.jsonl", os.O_WRONLY | os.O_NONBLOCK))  # the thread ends


def test_a_time_limit():
    assert finished_in_time(lambda: 3, 10.0) == 3
    assert finished_in_time(threading.Event().wait, 0.01) is None
    with pytest.raises(ZeroDivisionError):
        finished_in_time(lambda: 1 // 0, 10.0)


TASK = {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1"}


def test_several_tasks_per_node_are_refused_on_all_of_them(config_file, monkeypatch, capsys):
    for name, value in {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert program.main([str(config_file)]) == 2
    assert "2 tasks on 1 nodes: a preflight has one task per node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "address", "said"),
    [
        ("0", "no-such-host.invalid", "MASTER_ADDR = no-such-host.invalid: cannot be resolved ("),
        ("1", "127.0.0.1", "node 0 could not be reached at 127.0.0.1, port "),
    ],
)
def test_a_node_0_that_cannot_be_reached(rank, address, said, config_file, tmp_path, monkeypatch, capfd):
    variables = {"SLURM_PROCID": rank, "SLURMD_NODENAME": "n7", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    for name, value in {**TASK, **variables}.items():
        monkeypatch.setenv(name, value)
    given = ["--timeout", "1", "--port", str(free_port()), "--exclude-file", str(tmp_path / "bad")]
    assert program.main([str(config_file), *given]) == 1
    (line,) = capfd.readouterr().err.splitlines()  # no stack of torch
    assert line.startswith(f"fipo preflight: n7: {said}")
    assert (tmp_path / "bad").exists() == (rank == "0")


def test_a_port_of_the_reports_that_is_taken(config_file, tmp_path, monkeypatch, capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {**TASK, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        assert program.main([str(config_file), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port}, at which node 0 gathers the reports, cannot be used: " in said
    assert "choose another one with --port" in said


def test_one_machine_alone(config_file, tmp_path, capsys):
    files = ["--json", str(tmp_path / "result.json"), "--exclude-file", str(tmp_path / "bad")]
    assert program.main([str(config_file), *files, "run.steps=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "preflight: 1 of 1 nodes are good"
    assert json.loads((tmp_path / "result.json").read_text())["code"] == 0
    (tmp_path / "data.jsonl").unlink()
    assert program.main([str(config_file), *files]) == 1
    assert (tmp_path / "bad").read_text() == f"{socket.gethostname()}\n"
    assert "cannot be read: No such file or directory" in capsys.readouterr().out
    assert list(Path(tmp_path / "shared").iterdir()) == []
