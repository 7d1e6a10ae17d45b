"""The checks are pure functions of what the nodes report."""

from dataclasses import replace

import pytest

from fipo_megatron.config import ParallelConfig, load_config
from fipo_megatron.plan.gpu_memory import GIB
from fipo_megatron.preflight.blame import nodes_at_fault
from fipo_megatron.preflight.gathering import Absent
from fipo_megatron.preflight.job import Expected, Job
from fipo_megatron.preflight.memory_plan import plan_memory
from fipo_megatron.preflight.node_facts import AllReduceFacts, GpuFacts, InputFact, NeighbourFacts, NodeFacts
from fipo_megatron.preflight.verdict_table import Verdict
from tests.preflight.nodes import write_inputs

GPUS = GpuFacts(names=("NVIDIA H100 80GB HBM3",) * 8, driver="580.82", usable=8, memory=(80 * GIB,) * 8)


def node(rank, **changes):
    changes = {"gpus": GPUS} | changes
    return NodeFacts(rank, f"n{rank + 1}", f"host{rank + 1}", greeter_port=40000, **changes)


def job(*nodes, neighbours=None, expected=None, **others):
    reports = {one.rank: one for one in nodes}
    names = {rank: f"n{rank + 1}" for rank in range(max([*reports, *others.get("absent", {})]) + 1)}
    found = {rank: NeighbourFacts(clock_ahead=0.0) for rank in reports} | (neighbours or {})
    return Job(expected or Expected(), names, reports, neighbours=found, **others)


def said(verdict):
    """All sentences about nodes, then those about the job."""
    nodes = [f"{name}: {text}" for name, texts in verdict.problems().items() for text in texts]
    return [*nodes, *(f"job: {text}" for text in verdict.job_problems)]


def test_good_nodes_have_no_problems():
    verdict = Verdict.of(job(node(0), node(1), node(2)))
    assert (verdict.code, verdict.bad_nodes, said(verdict)) == (0, [], [])
    assert verdict.table().splitlines()[-1] == "preflight: 3 of 3 nodes are good"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"gpus": replace(GPUS, names=GPUS.names[:7], usable=7)},
            "n2: GPUs: torch can use 7 GPUs (nvidia-smi lists 7); there must be 8, as on most nodes",
        ),
        (
            {"gpus": replace(GPUS, usable=0)},
            "n2: GPUs: torch can use 0 GPUs (nvidia-smi lists 8); there must be 8, as on most nodes",
        ),
        (
            {"gpus": replace(GPUS, names=("NVIDIA A100",) * 8)},
            "n2: GPUs: has NVIDIA A100; must have NVIDIA H100 80GB HBM3, as most nodes",
        ),
        (
            {"gpus": GpuFacts(problem="nvidia-smi ended with 9: no driver")},
            "n2: GPUs: nvidia-smi ended with 9: no driver",
        ),
        (
            {"gpus": replace(GPUS, driver="550.54")},
            "n2: driver: driver 550.54; must be 580.82, as on n1",
        ),
        (
            {"gpus": replace(GPUS, errors=("GPU 3 could not remap a memory row",), kernel_log=("PCI:1 had Xid 79",))},
            "n2: GPU errors: GPU 3 could not remap a memory row; PCI:1 had Xid 79; there must be none: reset the GPU "
            "or report the node",
        ),
        (
            {"output_problem": "run.output: /x: cannot be written: Read-only file system"},
            "n2: output: run.output: /x: cannot be written: Read-only file system; every node must write there",
        ),
        (
            {"free_bytes": 10**9, "needed_bytes": 5 * 10**9},
            "n2: disk: 1.0 GB are free at run.output; its checkpoints need about 5.0 GB (checkpoint.keep_last)",
        ),
        (
            {"inputs": (InputFact("model.path = 'm'", problem="m/config.json cannot be read: Permission denied"),)},
            "n2: inputs: model.path = 'm': m/config.json cannot be read: Permission denied",
        ),
        (
            {"inputs": (InputFact("model.path = 'm'", 12, "bb"),)},
            "n2: inputs: model.path = 'm': its files or their sizes differ (12 bytes); they must be those of n1",
        ),
        (
            {"name_problem": "the own host name host2 resolves to 127.0.1.1"},
            "n2: names: the own host name host2 resolves to 127.0.1.1",
        ),
        ({"port_problems": ("MASTER_PORT = 29500: is in use",)}, "n2: ports: MASTER_PORT = 29500: is in use"),
        (
            {"versions": {"torch": "2.10.0", "megatron-core": "0.16.1"}},
            "n2: torch: torch is 2.10.0; must be 2.11.0, as on n1",
        ),
        ({"versions": {"torch": "2.11.0"}}, "n2: torch: megatron-core is not installed; must be 0.16.1, as on n1"),
        (
            {"server_versions": {"sglang": "0.5.22"}},
            "n2: SGLang: in SGLang's environment sglang is 0.5.22; must be 0.5.23, as on n1",
        ),
        ({"server_problem": "rollout.servers.python = x: no"}, "n2: SGLang: rollout.servers.python = x: no"),
        (
            {"config_problem": "c.yaml: cannot be read"},
            "n2: report: cannot read the configuration that node 0 reads: c.yaml: cannot be read",
        ),
    ],
)
def test_a_node_that_differs_is_named_alone(changes, sentence):
    common = {
        "versions": {"torch": "2.11.0", "megatron-core": "0.16.1"},
        "server_versions": {"sglang": "0.5.23"},
        "inputs": (InputFact("model.path = 'm'", 10, "aa"),),
        "free_bytes": 10**12,
        "needed_bytes": 10**9,
    }
    odd = replace(node(1, **common), **changes)
    verdict = Verdict.of(job(node(0, **common), odd, node(2, **common)))
    assert said(verdict) == [sentence]
    assert (verdict.code, verdict.bad_nodes) == (1, ["n2"])
    assert verdict.table().count("BAD") == 1
    assert verdict.table().splitlines()[-1] == "preflight: 2 of 3 nodes are good; bad: n2"


def test_the_number_of_gpus_that_is_expected_counts_more_than_that_of_most_nodes():
    verdict = Verdict.of(job(node(0), node(1), expected=Expected(gpus_per_node=4)))
    assert said(verdict) == [
        f"{name}: GPUs: torch can use 8 GPUs (nvidia-smi lists 8); there must be 4, as expected (--gpus-per-node or "
        "Slurm)"
        for name in ("n1", "n2")
    ]


def test_a_kernel_log_that_cannot_be_read_is_said_and_is_no_problem():
    unreadable = replace(GPUS, kernel_log=None, kernel_log_problem="/dev/kmsg: Operation not permitted")
    verdict = Verdict.of(job(replace(node(0), gpus=unreadable)))
    assert (verdict.code, verdict.cells["GPU errors"][0].text) == (0, "log not readable")


def test_absent_nodes_are_named_with_what_they_examined_last():
    absent = {1: Absent(), 2: Absent("n3", "the output directory (/data)")}
    verdict = Verdict.of(job(node(0), absent=absent))
    assert said(verdict) == [
        "n2: report: has not started; must report within 60 s (--timeout)",
        "n3: report: has started but not reported, it was examining the output directory (/data); must report within "
        "60 s (--timeout)",
    ]


@pytest.mark.parametrize(
    ("ahead", "bad"), [((0.0, 0.1, 90.0), "n3"), ((0.0, 90.0, 90.1), "n1"), ((0.0, 0.9, -0.9), None)]
)
def test_clocks_are_compared_with_the_median(ahead, bad):
    found = {rank: NeighbourFacts(clock_ahead=seconds) for rank, seconds in enumerate(ahead)}
    verdict = Verdict.of(job(node(0), node(1), node(2), neighbours=found))
    assert verdict.bad_nodes == ([bad] if bad else [])


def test_of_two_clocks_that_of_node_0_is_the_reference():
    found = {0: NeighbourFacts(clock_ahead=0.0), 1: NeighbourFacts(clock_ahead=-5.0, clock_error=0.001)}
    assert said(Verdict.of(job(node(0), node(1), neighbours=found))) == [
        "n2: clock: its clock is 5.0 s behind the others; at most 1 s are allowed (--max-clock-skew)"
    ]


def test_the_error_of_the_measurement_is_no_skew():
    found = {0: NeighbourFacts(clock_ahead=0.0), 1: NeighbourFacts(clock_ahead=1.5, clock_error=0.7)}
    assert Verdict.of(job(node(0), node(1), neighbours=found)).code == 0


@pytest.mark.parametrize(
    ("fact", "check", "forward", "backward"),
    [
        ("invisible", "shared", "does not see the file of n1: E", "its file is not seen by n1: E"),
        ("unreachable", "connections", "cannot connect to n1: E", "n1 cannot connect to it: E"),
        ("unresolved", "names", "E", "on n1, E"),
    ],
)
def test_failures_between_nodes_name_few_nodes(fact, check, forward, backward):
    isolated = {1: NeighbourFacts(clock_ahead=0.0, **{fact: {0: "E", 2: "E"}})}
    (sentence,) = said(Verdict.of(job(node(0), node(1), node(2), neighbours=isolated)))
    assert sentence.startswith(f"n2: {check}: {forward} (and 1 more); ")
    seen = {rank: NeighbourFacts(clock_ahead=0.0, **{fact: {1: "E"}}) for rank in (0, 2)}
    (sentence,) = said(Verdict.of(job(node(0), node(1), node(2), neighbours=seen)))
    assert sentence.startswith(f"n2: {check}: {backward} (and 1 more); ")


@pytest.mark.parametrize(
    ("failures", "fault"),
    [
        ([], set()),
        ([(0, 1)], {1}),
        ([(1, 0), (1, 2), (3, 1)], {1}),
        ([(0, 1), (0, 2), (0, 3)], {0}),
        ([(0, 1), (2, 3)], {1, 3}),
    ],
)
def test_nodes_at_fault(failures, fault):
    assert nodes_at_fault(failures) == fault


def measured(**facts):
    nodes = [node(rank) for rank in range(3)]
    return Verdict.of(
        job(*nodes, all_reduce={int(k[1]): v for k, v in facts.items()}, expected=Expected(min_bandwidth=20))
    )


def test_a_fast_all_reduce():
    verdict = measured(r0=AllReduceFacts(200.0), r1=AllReduceFacts(200.0), r2=AllReduceFacts(200.0))
    assert (verdict.code, verdict.cells["GB/s"][0].text) == (0, "200")


def test_a_node_that_is_slow_with_its_neighbours_or_alone_is_named():
    pairs = [{1: 3.0, 2: 100.0}, {0: 3.0, 2: 4.0}, {1: 4.0, 0: 100.0}]
    verdict = measured(**{f"r{rank}": AllReduceFacts(3.0, 300.0, pair) for rank, pair in enumerate(pairs)})
    assert said(verdict) == [
        "n2: GB/s: an all-reduce with one other node reaches 4 GB/s; it must reach 20 GB/s (--min-bandwidth)"
    ]
    alone = {f"r{rank}": AllReduceFacts(3.0, own) for rank, own in enumerate([300.0, 300.0, 2.5])}
    assert said(measured(**alone)) == [
        "n3: GB/s: an all-reduce of its own GPUs reaches 2.5 GB/s; it must reach 20 GB/s (--min-bandwidth)"
    ]


def test_no_node_is_blamed_for_what_all_share():
    same = {1: 100.0, 2: 100.0}
    verdict = measured(**{f"r{rank}": AllReduceFacts(3.0, 300.0, same) for rank in range(3)})
    assert (verdict.code, verdict.bad_nodes) == (1, [])
    assert said(verdict) == [
        "job: the all-reduce over all nodes reaches 3 GB/s; it must reach 20 GB/s (--min-bandwidth), and no node was "
        "found to be slower than the others"
    ]
    failed = {f"r{rank}": AllReduceFacts(problem="had not ended after 60 s") for rank in range(3)}
    assert said(measured(**failed)) == ["job: the all-reduce had not ended after 60 s, on every node; it must succeed"]


def test_a_node_whose_all_reduce_fails_alone_is_named():
    verdict = measured(
        r0=AllReduceFacts(200.0), r1=AllReduceFacts(problem="failed: no device"), r2=AllReduceFacts(200.0)
    )
    assert said(verdict) == ["n2: GB/s: the all-reduce failed: no device; it must succeed on all nodes"]


def test_a_layout_that_does_not_fit_the_gpus_is_a_problem_of_the_job():
    fits = Expected(parallel=ParallelConfig(tensor_parallel=8, pipeline_parallel=2))
    assert Verdict.of(job(node(0), node(1), expected=fits)).code == 0
    verdict = Verdict.of(job(node(0), node(1), node(2), expected=fits))
    assert (verdict.code, verdict.bad_nodes) == (1, [])
    assert said(verdict)[0].endswith("needs a multiple of 16 ranks, there are 24")
    servers = Expected(server_gpus=8)
    assert said(Verdict.of(job(node(0), expected=servers))) == [
        "job: 8 GPUs per node: the servers take 8 and leave none to the trainer"
    ]


A100 = GpuFacts(names=("NVIDIA A100-SXM4-40GB",) * 4, driver="550.54", usable=4, memory=(40 * GIB,) * 4, given=4)


def test_nodes_that_serve_are_compared_with_each_other():
    """They may have other GPUs, another driver, and no data; a server's environment is theirs alone."""
    model, data = InputFact("model.path = 'm'", 10, "aa"), InputFact("data.files: 'd'", 5, "bb")
    trainer = [node(rank, inputs=(model, data)) for rank in range(2)]
    common = {"gpus": A100, "serves": True, "inputs": (model,), "server_versions": {"sglang": "0.5.23"}}
    servers = [node(rank, **common) for rank in (2, 3, 4)]
    expected = Expected(rollout_nodes=3, parallel=ParallelConfig(tensor_parallel=8, pipeline_parallel=2))
    verdict = Verdict.of(job(*trainer, *servers, expected=expected))
    assert said(verdict) == []
    rows = [line.split()[:3] for line in verdict.table().splitlines()[:6]]
    assert rows[0] == ["node", "use", "report"]
    assert [row[1] for row in rows[1:]] == ["trainer", "trainer", "servers", "servers", "servers"]
    lacks = replace(A100, names=A100.names[:3], usable=3)
    odd = {"gpus": lacks, "inputs": (replace(model, digest="cc"),), "server_versions": {"sglang": "0.5.22"}}
    verdict = Verdict.of(job(*trainer, *servers[:2], replace(servers[2], **odd), expected=expected))
    assert said(verdict) == [
        "n5: GPUs: torch can use 3 GPUs (nvidia-smi lists 3); there must be 4, as expected (--gpus-per-node or Slurm)",
        "n5: inputs: model.path = 'm': its files or their sizes differ (10 bytes); they must be those of n1",
        "n5: SGLang: in SGLang's environment sglang is 0.5.22; must be 0.5.23, as on n3",
    ]


def test_an_absent_node_that_serves_is_none_of_the_trainer():
    expected = Expected(rollout_nodes=1, parallel=ParallelConfig(tensor_parallel=8))
    verdict = Verdict.of(job(node(0), absent={1: Absent()}, expected=expected))
    assert said(verdict) == ["n2: report: has not started; must report within 60 s (--timeout)"]
    assert verdict.cells["use"][1].text == "servers"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a run with two pipeline stages over two nodes of eight GPUs."""
    directory = tmp_path_factory.mktemp("plan")
    given = [*("rollout.engine=sglang", "actor.parallel.pipeline_parallel=2"), "rollout.sglang={tp_size: 2}"]
    return plan_memory(load_config(write_inputs(directory), given), nodes=2, ranks_per_node=8)


def of_size(gib):
    return replace(GPUS, memory=(*GPUS.memory[:7], int(gib * GIB)))


def test_the_plan_is_that_of_the_stages_of_a_node(planned):
    first, last = planned.stages
    assert first.name.startswith("stage 0: ")
    assert planned.of_node(0) == first
    assert planned.of_node(1) == last
    assert replace(planned, ranks_per_node=16).of_node(0) == max(first, last, key=lambda stage: stage.planned)
    assert 0 < first.needed < first.planned


def test_a_gpu_with_too_little_memory_is_named(planned):
    expected = Expected(memory=planned, rollout_nodes=3)
    small = planned.stages[1].needed / GIB / 2
    nodes = [node(0), node(1), *(node(rank, serves=True) for rank in (2, 3, 4))]
    assert said(Verdict.of(job(*nodes, expected=expected))) == []
    nodes[1] = node(1, gpus=of_size(small))
    nodes[3] = node(3, serves=True, gpus=of_size(8))
    verdict = Verdict.of(job(*nodes, expected=expected))
    assert [sentence.partition(" needs")[0] for sentence in said(verdict)] == [
        f"n2: memory: {planned.stages[1].name}",
        "n4: memory: a server has no room for a response of full length beside the weights, a GPU has 8.0 GiB; raise "
        "rollout.sglang.tp_size",
    ]
    assert f"a GPU has {small:.1f} GiB; fipo plan names layouts that fit" in said(verdict)[0]
    assert verdict.cells["memory"][0].text == f"{planned.stages[0].planned / GIB:.1f} of 80.0 GiB"


def test_a_run_that_fits_no_node_is_a_problem_of_the_job(planned):
    small = of_size(planned.stages[1].needed / GIB / 2)
    verdict = Verdict.of(job(node(0, gpus=small), node(1, gpus=small), expected=Expected(memory=planned)))
    assert verdict.bad_nodes == []
    assert [sentence.partition(" needs")[0] for sentence in said(verdict)] == [
        f"job: {stage.name}" for stage in planned.stages
    ]


def test_nodes_without_gpus_or_a_plan_say_so(planned):
    verdict = Verdict.of(job(node(0, gpus=GpuFacts()), expected=Expected(memory=planned)))
    assert (verdict.cells["memory"][0].text, verdict.code) == ("no GPU", 0)
    assert Verdict.of(job(node(0))).cells["memory"][0].text == "not planned"


def test_a_layout_that_is_not_valid_is_not_planned(tmp_path):
    config = load_config(write_inputs(tmp_path), ["actor.parallel.pipeline_parallel=2"])
    assert plan_memory(config, nodes=1, ranks_per_node=3) is None


def test_facts_survive_json():
    one = node(1, inputs=(InputFact("a", 1, "b"),), versions={"torch": "1"}, free_bytes=5)
    assert NodeFacts.from_json(one.to_json()) == one
    near = NeighbourFacts({2: "E"}, {3: "F"}, {4: "G"}, 0.5, 0.1)
    assert NeighbourFacts.from_json(near.to_json()) == near
    fast = AllReduceFacts(1.0, 2.0, {3: 4.0})
    assert AllReduceFacts.from_json(fast.to_json()) == fast
