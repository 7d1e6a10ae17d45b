"""Runs as jobs on two nodes: disturbed in every way, they end as one that was not, bit for bit."""

import signal

import pytest

from tests.runs import weights
from tests.slurm.jobs import STEPS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def preempt(job):
    """Submits a job to a partition of higher priority, which needs the same nodes, and waits until it has ended."""
    options = ["--partition=urgent", f"--nodelist={','.join(job.nodes())}", "--exclusive", "--output=/dev/null"]
    urgent = job.cluster.run("sbatch", "--parsable", *options, "--nodes=2", "--wrap=sleep 1").stdout.strip()
    job.wait_for(lambda: "USR1: the run ends after its step" in job.log.rpartition("is requeued")[2], "preemption")
    job.wait_for(lambda: job.starts == 8, "start after the preemption")
    said = job.cluster.run("scontrol", "show", "job", urgent).stdout
    assert "JobState=COMPLETED" in said or "JobState=RUNNING" in said


def test_a_disturbed_job_ends_as_one_that_was_not(cluster, data, whole, tmp_path):
    """Each disturbance comes after a newly finished step; each makes Slurm start the job again, which resumes."""
    job = Job.train(cluster, data, tmp_path)
    job.wait_for_step(start=1)
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_step(start=2)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does before the time limit
    job.wait_for_step(start=3)
    assert "USR1: the run ends after its step" in job.log
    assert "stopped (USR1)" in job.log
    running = job.processes()
    assert len(running) > 2
    job.kill_rank(1, signal.SIGKILL)
    job.wait_for_step(start=4)
    assert not running & job.processes(), "the other rank, and all of its children, are gone"
    cluster.run("scancel", "--signal=KILL", job.step())
    job.wait_for_step(start=5)
    job.kill_rank(1, signal.SIGSTOP)
    job.wait_for_step(start=6)
    stacks = {file.stem: file.read_text() for file in (job.run / "stacks").glob("*.txt")}
    assert sorted(stacks) == ["rank-0000", "rank-0001"]
    assert all("Current thread" in text or "Thread 0x" in text for text in stacks.values())
    lost = job.nodes()[1]
    with job.held():
        cluster.kill_node(lost)
        job.wait_for(lambda: job.starts == 7, "start after a lost node")
    job.wait_for_step(start=7)
    assert lost not in job.nodes()
    cluster.start_node(lost)
    preempt(job)
    job.wait_for_step(start=8)
    job.wait()
    whole.wait()

    assert [row["step"] for row in job.rows()] == [*range(STEPS)]
    assert (job.run / "metrics.jsonl").read_bytes() == (whole.run / "metrics.jsonl").read_bytes()
    assert all(weight.equal(weights(job.run)[name]) for name, weight in weights(whole.run).items())
    assert job.rows("timing.jsonl")[-1]["run/restarts"] == 7
    assert {row["run/restarts"] for row in whole.rows("timing.jsonl")} == {0}
    assert whole.starts == 1
    assert sorted(path.name for path in whole.logs.iterdir()) == ["rank-0000.log", "rank-0001.log"]
    job.wait_for_end_of_processes()
