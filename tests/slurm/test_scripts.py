"""The shipped scripts as files: shellcheck, and what Slurm says to their options."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import arguments
from tests.slurm.jobs import ROOT, SCRIPTS, SETTINGS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

NAMES = sorted(path.name for path in SCRIPTS.glob("*.sbatch"))


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    files = [f"examples/slurm/{path.name}" for path in sorted(SCRIPTS.iterdir())]
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_slurm_accepts_the_script(name, cluster):
    component = ["--nodes=2", "--ntasks-per-node=1"]
    options = [*component, ":", *component] if name.startswith("disagg") else component
    done = cluster.run("sbatch", "--test-only", *options, str(SCRIPTS / name), "CONFIG", cwd=ROOT)
    assert "to start at" in done.stderr or not done.stderr, done.stderr


def test_a_wrong_configuration_ends_the_job_before_a_rank_starts(cluster, tmp_path):
    job = Job.submit(
        cluster, tmp_path, "colocated.sbatch", "examples/quickstart/fipo.yaml", "run.stps=1", options=["--nodes=2"]
    )
    job.wait("FAILED")
    assert "run.stps = 1: unknown key; did you mean run.steps?" in job.log
    assert "ExitCode=2:0" in cluster.run("scontrol", "show", "job", job.number).stdout


def broken_python(tmp_path, condition):
    """Writes a Python with another version of a package on the nodes on which a shell command succeeds."""
    other = tmp_path / "other" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif {condition}; then export PYTHONPATH="{other.parent}:$PYTHONPATH"; fi\n'
        'exec "$REAL_PYTHON" "$@"\n'
    )
    python.chmod(0o755)
    return python


def test_a_bad_node_ends_the_job_before_a_rank_starts(cluster, data, tmp_path):
    python = broken_python(tmp_path, '[ "$SLURM_NODEID" = 1 ]')
    job = Job.train(cluster, data, tmp_path, options=[f"--export=ALL,FIPO_PREFLIGHT=on,FIPO_PYTHON={python}"])
    job.wait("FAILED")
    bad = job.nodes()[1]
    assert f"{bad}: torch: transformers is 4.0.0" in job.log
    assert f"sbatch --exclude={bad} avoids bad nodes" in job.log
    assert not job.rows()
    assert not list(job.logs.glob("rank-*.log"))


def test_a_bad_node_is_replaced(cluster, data, tmp_path):
    """The second node of the first start is bad, and stays so. A node that the user has excluded stays excluded."""
    name, used = tmp_path / "name", '"$SLURMD_NODENAME"'
    noted = f'[ -e {name} ] || [ "$SLURM_NODEID" != 1 ] || echo {used} > {name}; [ "$(cat {name})" = {used} ]'
    python = broken_python(tmp_path, noted)
    options = [f"--export=ALL,FIPO_PREFLIGHT=replace,FIPO_PYTHON={python}", "--exclude=n1"]
    job = Job.train(cluster, data, tmp_path, "run.steps=1", options=options)
    job.wait()
    bad = name.read_text().strip()
    assert f"is requeued on other nodes than {bad}" in job.log
    assert (job.starts, len(job.rows())) == (2, 1)
    assert not {bad, "n1"} & {*job.nodes()}
    assert f"ExcNodeList=n1,{bad}" in cluster.run("scontrol", "show", "job", job.number).stdout


def test_the_plan_and_the_nodes_are_checked_without_training(cluster, data, tmp_path):
    given = arguments(data, tmp_path / "run", *SETTINGS)
    options = ["--nodes=2", "--export=ALL,FIPO_ROLLOUT_NODES=0"]
    job = Job.submit(cluster, tmp_path, "preflight.sbatch", *given, options=options)
    job.wait()
    assert "Fits: at most " in job.log
    assert "no GPU" in job.log
    assert "preflight: 2 of 2 nodes are good" in job.log
    assert not job.rows()


def test_starts_that_finish_no_step_are_limited(cluster, data, tmp_path):
    """The interpreter ends at once, so that no start takes long; the third one is the last."""
    job = Job.train(
        cluster, data, tmp_path, options=["--export=ALL,FIPO_STARTS=3,FIPO_PYTHON=" + str(broken(tmp_path))]
    )
    job.wait("FAILED")
    assert job.starts == 3
    assert job.log.count("is requeued and resumes") == 2
    assert "ends: 3 starts without a newly finished step" in job.log


def broken(directory):
    """Writes a Python that can read a configuration, but train nothing."""
    file = directory / "python"
    file.write_text('#!/bin/sh\n[ "$2" = fipo_megatron.cli ] || exit 1\nexec "$REAL_PYTHON" "$@"\n')
    file.chmod(0o755)
    return file


def test_a_start_that_cannot_be_counted_ends_the_job(cluster, data, tmp_path):
    """The disk is full: the directories of the run exist, but no file can grow."""
    output = tmp_path / "run"
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", output], check=True)
    try:
        (output / "full").write_bytes(bytes(8192))
        job = Job.train(cluster, data, tmp_path)
        job.wait("FAILED")
    finally:
        subprocess.run(["umount", output], check=True)
    assert f"ends: {output}/slurm/starts cannot be written" in job.log
    assert "is requeued" not in job.log


def test_a_cancelled_job_is_not_requeued(cluster, data, tmp_path):
    job = Job.train(cluster, data, tmp_path)
    job.wait_for(lambda: job.starts == 1, "start")
    cluster.run("scancel", job.number)
    job.wait("CANCELLED")
    assert "is requeued" not in job.log
    assert job.starts == 1


def test_a_job_saves_before_its_time_limit_and_is_ended_by_its_user(cluster, data, tmp_path):
    """Slurm looks every 30 s, and signals the script 40 to 70 s after its start; later the user does.

    The steps before and after the time limit are those of another job, bit for bit.
    """
    undisturbed = Job.train(cluster, data, tmp_path / "undisturbed")
    job = Job.train(cluster, data, tmp_path, options=["--time=2", "--signal=B:USR1@50"])
    with job.held():
        job.wait_for(lambda: "USR1: the run ends after its step" in job.log, "signal before the time limit")
    job.wait_for(lambda: job.starts == 2, "start after the time limit")
    assert "after 1 steps: stopped (USR1)" in job.log
    cluster.run("scancel", "--batch", "--signal=INT", job.number)
    job.wait()
    assert len(job.rows()) == 2
    undisturbed.wait_for(lambda: len(undisturbed.rows()) >= 2, "second step")
    cluster.run("scancel", undisturbed.number, check=False)
    assert job.rows() == undisturbed.rows()[:2]
    assert (job.run / "checkpoints" / "step-000002").is_dir()


def test_a_model_is_converted_by_ranks_on_both_nodes(cluster, data, tmp_path):
    arguments = ["hf-to-megatron", data / "model", tmp_path / "checkpoint", "--verify"]
    job = Job.submit(cluster, tmp_path, "convert.sbatch", *arguments, options=["--nodes=2"])
    job.wait()
    assert "the conversion has ended with exit code 0" in job.log
    assert (tmp_path / "checkpoint").is_dir()


def test_a_model_is_evaluated(cluster, data, tmp_path):
    given = [
        "examples/quickstart/fipo.yaml",
        *(f"model.path={data}/model", f"evaluation.files=[{data}/held_out.jsonl]", f"run.output={tmp_path}/run"),
        *("evaluation.samples_per_prompt=1", "rollout.max_response_tokens=8"),
    ]
    job = Job.submit(cluster, tmp_path, "evaluate.sbatch", *given, options=["--nodes=1"])
    job.wait()
    assert list((tmp_path / "run").glob("evaluation-*")), job.log
