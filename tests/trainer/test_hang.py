"""Runs that make no progress end by themselves and leave the stacks of every rank."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import ROOT, run_ranks
from tests.runs import arguments, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

HANG = "run.hang_seconds=6"


def stacks(run):
    return {path.stem: path.read_text() for path in (run / "stacks").glob("*.txt")}


@pytest.mark.parametrize(("ranks", "who"), [(1, "the run has made"), (2, "no rank has made")])
def test_a_run_without_progress_ends_and_leaves_all_stacks(ranks, who, data, tmp_path):
    """The last rank sleeps while it samples, and the first one waits for its groups: both are alive."""
    given = arguments(data, tmp_path / "run", HANG)
    done = run_ranks("tests.trainer.rank_faults", ranks - 1, "blocks_its_event_loop", *given, ranks=ranks)
    assert done.code == 1
    assert done.output.count(f"{who} progress for run.hang_seconds = 6 s; the run ends") == 1, done.output
    assert "Traceback" not in done.output
    assert len(metrics(tmp_path / "run")) == 1, "a step that is finished counts as progress"
    found = stacks(tmp_path / "run")
    assert sorted(found) == [f"rank-{rank:04}" for rank in range(ranks)]
    assert "rank_faults.py" in found[f"rank-{ranks - 1:04}"], "the line at which it hangs"
    assert all("run.hang_seconds" in text and "Current thread" in text for text in found.values())


def test_a_stopped_rank_writes_its_stacks_before_it_is_killed(data, tmp_path):
    given = arguments(data, tmp_path / "run", "rollout.silence_seconds=6")
    fault = {"FIPO_FAIL_AT": "update:2:1:SIGSTOP"}
    done = run_ranks("fipo_megatron.train", given, ranks=2, environment=fault)
    assert done.code in (1, -signal.SIGKILL)
    found = stacks(tmp_path / "run")
    assert "fail_points.py" in found["rank-0001"], "the line at which it was stopped"
    assert "rank 1" in found["rank-0000"]


def test_sigusr2_writes_the_stacks_of_a_run_that_goes_on(data, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fipo_megatron.train", *arguments(data, tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    sent = 0
    # Often: stacks that are written while threads run must not end the process.
    while not (tmp_path / "run" / "outcome.json").exists():
        assert process.poll() is None
        process.send_signal(signal.SIGUSR2)
        sent += 1
        time.sleep(0.005)
    assert process.wait(timeout=120) == 0
    written = stacks(tmp_path / "run")["rank-0000"]
    assert 1 <= written.count(": SIGUSR2\n") <= sent
    assert written.count("Current thread") == written.count(": SIGUSR2\n")


def test_a_run_that_never_hangs_leaves_no_stacks(recorded):
    assert not (recorded / "stacks").exists()
