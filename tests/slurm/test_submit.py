"""``fipo submit`` on a login node: its checks, and the command that it prints. Needs no Slurm."""

import shlex
import subprocess
import sys

import pytest

from fipo_megatron.slurm.submit import main
from tests.processes import ROOT

QUICKSTART = "examples/quickstart/fipo.yaml"
LAYOUT_32B = "examples/layouts/fipo_qwen2.5_32b_16_nodes.yaml"
LAYOUT_7B = "examples/layouts/fipo_qwen2.5_7b_math_1_node.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            (LAYOUT_32B, "--nodes", "16", "actor.parallel.tensor_paralel=4"),
            "did you mean actor.parallel.tensor_parallel?",
        ),
        ((LAYOUT_32B, "--nodes", "2"), "the trainer's ranks use all 8 GPUs of a node; give --rollout-nodes"),
        (
            (LAYOUT_32B, "--nodes", "3", "--rollout-nodes", "1", "actor.parallel.pipeline_parallel=3"),
            "needs a multiple of 24 ranks, there are 16",
        ),
        (
            (LAYOUT_32B, "--nodes", "3", "--rollout-nodes", "1", "rollout.sglang.tp_size=3"),
            "rollout.sglang.tp_size = 3: must divide the 8 GPUs of a node",
        ),
        ((LAYOUT_32B, "--nodes", "2", "--rollout-nodes", "2"), "--rollout-nodes 2: must be less than --nodes 2"),
        (
            (QUICKSTART, "--nodes", "2", "--rollout-nodes", "1"),
            "rollout.engine = embedded: must be sglang on rollout nodes",
        ),
        (
            (LAYOUT_7B, "--nodes", "1", "--kind", "preflight", "--replace-bad-nodes"),
            "--replace-bad-nodes: must not be given with --kind preflight, only with train",
        ),
        ((QUICKSTART, "--nodes", "2", "--kind", "evaluate"), "--kind evaluate: runs on one node"),
        ((QUICKSTART, "--nodes", "1", "model.path=/nowhere"), "model.path = /nowhere: has no config.json here"),
        ((QUICKSTART, "--nodes", "1", "data.files=[/no.jsonl]"), "data.files = /no.jsonl: does not exist here"),
    ],
)
def test_a_job_that_cannot_run_is_refused(arguments, problem, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert not said.out


@pytest.mark.parametrize("nodes", ["0", "-1", "two"])
def test_a_wrong_number_of_nodes_is_refused(nodes, capsys):
    with pytest.raises(SystemExit) as ended:
        main([QUICKSTART, "--nodes", nodes])
    assert ended.value.code == 2
    assert f"argument --nodes: '{nodes}': must be" in capsys.readouterr().err


def test_the_job_of_the_documentation_is_the_one_that_the_command_prints(capsys):
    """The page shows the command as typed, then what it prints."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    block = page.partition("$ fipo submit ")[2].partition("```")[0]
    typed, end, printed = block.partition("--dry-run\n")
    assert main(shlex.split(typed.replace("\\\n", "") + end)) == 0
    said = capsys.readouterr()
    assert said.err + said.out == printed


def test_the_scripts_are_found_from_another_directory(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(ROOT / QUICKSTART), "--nodes", "2", "--gpus-per-node", "0", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"export FIPO_SCRIPTS={ROOT}/examples/slurm" in said
    assert f"{ROOT}/examples/slurm/colocated.sbatch" in said
    assert "--gpus-per-node" not in said


def test_options_are_passed_on(capsys):
    options = ["--time", "02:00:00", "--sbatch=--qos=high", "--container-image", "a.sqsh", "--ranks-per-node", "4"]
    assert main([LAYOUT_7B, "--nodes", "1", *options, "--dry-run", "run.steps=3"]) == 0
    said = capsys.readouterr().out
    assert "export FIPO_CONTAINER=a.sqsh" in said
    assert "export FIPO_RANKS=4" in said
    words = said.replace("\\\n", "").split()
    assert words[-3:] == ["examples/slurm/colocated.sbatch", LAYOUT_7B, "run.steps=3"]
    assert "--time 02:00:00" in said
    assert "--qos=high" in words


def test_bad_nodes_are_replaced_on_request(capsys):
    assert main([LAYOUT_7B, "--nodes", "1", "--replace-bad-nodes", "--dry-run"]) == 0
    assert "export FIPO_PREFLIGHT=replace\n" in capsys.readouterr().out


@pytest.mark.parametrize(("nodes", "rollout", "warned"), [("16", "8", False), ("9", "1", True), ("9", "8", True)])
def test_a_component_of_one_node_is_warned_about(nodes, rollout, warned, capsys):
    assert main([LAYOUT_32B, "--nodes", nodes, "--rollout-nodes", rollout, "--dry-run"]) == 0
    assert ("note: the loss of a rollout node ends the trainer as well: " in capsys.readouterr().err) == warned


def test_nodes_that_will_serve_are_examined_as_such(capsys):
    given = [LAYOUT_32B, "--nodes", "16", "--rollout-nodes", "8", "--kind", "preflight", "--dry-run"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "export FIPO_ROLLOUT_NODES=8\n" in said
    assert "--nodes 16" in said


def test_without_sbatch_nothing_is_submitted(monkeypatch, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    (tmp_path / "problems.jsonl").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    given = [QUICKSTART, f"model.path={model}", f"data.files=[{tmp_path}/problems.jsonl]", "evaluation.files=[]"]
    assert main([*given, "run.evaluate_every=0", "--nodes", "1"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_no_torch_is_imported():
    program = (
        f"import sys; from fipo_megatron.slurm.submit import main; main(['{LAYOUT_7B}', '--nodes', '1', '--dry-run']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
