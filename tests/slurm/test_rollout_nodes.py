"""SGLang on rollout nodes of their own: real servers, one of which is killed and one of which is lost with its node."""

import os
import signal
from pathlib import Path

import pytest

from fipo_megatron.rollout import rollout_dump
from tests.runs import arguments
from tests.slurm.jobs import ROOT, SETTINGS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

STEPS = 6


def engine_processes(directory):
    """Returns the processes that serve: those with the directory of their URLs in their command line or log."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and str(directory).encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_a_run_outlives_a_killed_engine_step_and_a_lost_rollout_node(cluster, data, tmp_path):
    """Two ranks train on two nodes, two nodes serve. Every prompt of every step is answered once."""
    given = [
        *arguments(data, tmp_path / "run", *SETTINGS, f"run.steps={STEPS}", "run.record_rollouts=true"),
        *("rollout.engine=sglang", "rollout.servers.interface=lo", "rollout.sglang={max_total_tokens: 16384}"),
        f"rollout.servers.python={ROOT}/.venv-sglang/bin/python",
        "rollout.servers.environment={OMP_NUM_THREADS: '1'}",
        "rollout.silence_seconds=120",  # a server starts on busy cores; no rank is lost here
    ]
    nodes = ["--nodes=2"]
    job = Job.submit(cluster, tmp_path, "disaggregated.sbatch", *given, components=(nodes, nodes))
    job.wait_for_step(start=1)
    first, second = job.nodes(component=1)
    engine = (job.logs / "engines" / f"{first}.urls").read_text()
    with job.held():
        said = cluster.run("squeue", "--steps", "--noheader", f"--nodelist={first}", "--format=%i").stdout.split()
        cluster.run("scancel", "--signal=KILL", *[step for step in said if step.rpartition(".")[2].isdigit()])
        job.wait_for(lambda: f"ENGINES OF {first} HAVE ENDED" in job.log, "end of an engine step")
        log = job.logs / f"engine-{first}.log"
        job.wait_for(lambda: log.read_text().count("serves at") == 2, "second start of the engine step")
    assert (job.logs / "engines" / f"{first}.urls").read_text() == engine, "the trainer finds it where it was"
    steps = len(job.rows())
    job.wait_for(lambda: len(job.rows()) > steps, "step with both servers")
    with job.held():
        cluster.kill_node(second)
        for process in engine_processes(job.logs / "engines" / second):
            os.kill(process, signal.SIGKILL)
        job.wait_for(lambda: f"ENGINES OF {second} ARE LOST: 1 of 2 rollout nodes are" in job.log, "lost node")
    job.wait()
    cluster.start_node(second)
    assert job.starts == 1, "the trainer has gone on"
    assert [row["step"] for row in job.rows()] == [*range(STEPS)]
    for step in range(STEPS):
        groups = rollout_dump.read(job.run / "rollouts", step, keep=True).groups
        names = [trajectory.name for group in groups for trajectory in group.trajectories]
        assert len(names) == len({*names}) == 16
    job.wait_for_end_of_processes()
