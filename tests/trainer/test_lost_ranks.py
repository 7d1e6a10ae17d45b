"""Ranks that are stopped, killed or fail alone: the others say what has happened, and nothing of the run is left.

With ``FIPO_LOST_RANKS=all`` each rank is stopped and killed in each phase; ``pytest -rP`` prints a row for each.
"""

import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.runs import ROOT, arguments, command, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PHASES = {"generate": "generate:2", "update": "update:2", "save": "checkpoint_write:1"}
LAYOUTS = {"DP2": [], "TP2": ["actor.parallel.tensor_parallel=2"]}
SILENCE_SECONDS = 10
SETTINGS = (f"rollout.silence_seconds={SILENCE_SECONDS}", "checkpoint.save_every=2")
LOST = {
    "SIGSTOP": f"has given no sign of life for rollout.silence_seconds = {SILENCE_SECONDS} s",
    "SIGKILL": "has ended without a word: it was killed or has crashed",
}
EVERY = [*itertools.product(LOST, LAYOUTS, PHASES, (0, 1))]
SOME = [("SIGKILL", "TP2", "save", 1)]
HOST = socket.gethostname()


def start(data, home, *overrides, fail_at=""):
    """Starts a run of two ranks under torchrun, whose processes have a home directory of their own."""
    return subprocess.Popen(
        command(data, home / "run", *SETTINGS, *overrides, ranks=2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(home), "FIPO_FAIL_AT": fail_at},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seen_in(file, process):
    """Waits until a running process has written something into a file."""
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.02)


def processes(home):
    """Returns the state and the parent of all processes with this home directory, which a run hands down."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = tuple((path / "stat").read_text().rpartition(")")[2].split()[:2])
    return found


def none_is_left(home, seconds=30.0):
    """Waits for processes whose parent has ended: they see it soon, not at once; returns whether all have ended."""
    end = time.monotonic() + seconds
    while (left := processes(home)) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def seconds_until_nothing_is_left(torchrun, home, name):
    """Waits until no process is left, not even a zombie; returns the seconds since a rank was stopped or had ended."""
    since, ranks, seen = None, set(), set()
    while torchrun.poll() is None or any(Path(f"/proc/{pid}").exists() for pid in seen):
        now = processes(home)
        seen |= now.keys() - {torchrun.pid}
        ranks |= {pid for pid, (_, parent) in now.items() if int(parent) == torchrun.pid}
        states = [now.get(pid, ("Z",))[0] for pid in ranks]
        if since is None and any(state in ("T" if name == "SIGSTOP" else "ZX") for state in states):
            since = time.monotonic()
        time.sleep(0.02)
    return time.monotonic() - (since or math.inf)


@pytest.mark.parametrize(("name", "layout", "phase", "rank"), EVERY if os.environ.get("FIPO_LOST_RANKS") else SOME)
def test_a_rank_lost_under_torchrun_ends_the_run(name, layout, phase, rank, data, tmp_path):
    """A stopped rank counts as lost after ``rollout.silence_seconds``, a killed one at once."""
    torchrun = start(data, tmp_path, *LAYOUTS[layout], fail_at=f"{PHASES[phase]}:{rank}:{name}")
    seconds = seconds_until_nothing_is_left(torchrun, tmp_path, name)
    said = torchrun.communicate()[0]
    told = [line for line in said.splitlines() if f"rank {rank} on {HOST} (process" in line and LOST[name] in line]
    print(f"| {layout} | {phase} | {rank} | {name} | {seconds:.1f} | {' '.join(told)} |")
    assert torchrun.returncode == 1, said
    assert len(told) == 1, said
    assert "resume from its last checkpoint" in told[0]
    assert "Traceback" not in re.sub(r"Traceback[^\0]*?ChildFailedError", "", said), f"more than torchrun's own\n{said}"


SERVED_BY_RANK_0 = [("SIGSTOP", "DP2", "generate", 1), ("SIGKILL", "DP2", "generate", 0)]


@pytest.mark.parametrize(
    ("name", "layout", "phase", "rank"),
    [*SERVED_BY_RANK_0, ("SIGSTOP", "TP2", "update", 0)] if os.environ.get("FIPO_LOST_RANKS") else SERVED_BY_RANK_0,
)
def test_a_rank_lost_under_srun_ends_the_run(name, layout, phase, rank, data, tmp_path):
    """Rank 0 serves the store, and nobody ends the other ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "MASTER_PORT": str(port),
        "HOME": str(tmp_path),
        "FIPO_FAIL_AT": f"{PHASES[phase]}:{rank}:{name}",
    }
    given = arguments(data, tmp_path / "run", *SETTINGS, *LAYOUTS[layout])
    done = run_ranks("fipo_megatron.train", given, ranks=2, environment=environment)
    if rank:
        # The monitor of the ranks or the exchange of the sampler, whichever notices it first.
        by_monitor = f"rank 1 on {HOST} (process" in done.output and LOST[name] in done.output
        assert by_monitor or f"rank 1 has sent no heartbeat for {SILENCE_SECONDS} s" in done.output, done.output
    else:
        what = {"SIGKILL": "is gone", "SIGSTOP": f"has not answered for {SILENCE_SECONDS} s"}[name]
        assert f"rank 1 on {HOST}: the store of the run at 127.0.0.1, port {port} {what}" in done.output
    assert "Traceback" not in done.output
    assert none_is_left(tmp_path)


@pytest.mark.skipif(not os.environ.get("FIPO_LOST_RANKS"), reason="FIPO_LOST_RANKS is not set")
def test_a_run_that_was_suspended_as_a_whole_goes_on(data, tmp_path):
    """Every rank finds the others silent for longer than allowed, but it was not running itself."""
    torchrun = start(data, tmp_path, "run.steps=3")
    seen_in(tmp_path / "run" / "metrics.jsonl", torchrun)
    ranks = [pid for pid, (_, parent) in processes(tmp_path).items() if int(parent) == torchrun.pid]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, number)
        time.sleep(SILENCE_SECONDS + 5 if number == signal.SIGSTOP else 0)
    said = torchrun.communicate(timeout=120)[0]
    assert torchrun.returncode == 0, said
    assert len(metrics(tmp_path / "run")) == 3


def test_no_process_outlives_a_torchrun_that_is_killed(data, tmp_path):
    """SIGKILL of torchrun itself: ranks, their monitors and verifiers end, and the log says why."""
    torchrun = start(data, tmp_path, "run.steps=60")
    seen_in(tmp_path / "run" / "metrics.jsonl", torchrun)
    assert len(processes(tmp_path)) > 3, "torchrun, two ranks and a verifier"
    torchrun.kill()
    assert none_is_left(tmp_path)
    said = torchrun.communicate(timeout=60)[0]
    assert "rank 0 or its torchrun was killed or stopped. Run it again to resume from its last checkpoint" in said


def test_torchrun_ends_with_1_after_a_saved_stop(data, tmp_path):
    """The documentation says so, and what to look at instead. Slurm may send the signal to the ranks, too."""
    torchrun = start(data, tmp_path, "run.steps=60")
    seen_in(tmp_path / "run" / "metrics.jsonl", torchrun)
    ranks = [pid for pid, (_, parent) in processes(tmp_path).items() if int(parent) == torchrun.pid]
    for pid in (torchrun.pid, *ranks):
        os.kill(pid, signal.SIGTERM)
    said = torchrun.communicate(timeout=120)[0]
    assert torchrun.returncode == 1, said
    assert (
        "SIGTERM: the run ends after this step; once more ends it at once; torchrun kills this rank after 30 s" in said
    )
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    rows = len(metrics(tmp_path / "run"))
    assert outcome == {"outcome": "stopped", "step": rows, "exit_code": 0}
    assert rows < 60
    assert (tmp_path / "run" / "checkpoints" / f"step-{rows:06}").is_dir()


@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("model.path=/nowhere", 1, "model.path = '/nowhere': has no config.json"),
        ("rollout.prompts_per_stp=3", 1, "did you mean rollout.prompts_per_step?"),
        ("reward.verifier=python:no.such", 0, "reward.verifier = python:no.such: there is no module"),
    ],
)
def test_an_error_of_one_rank_is_told_once(fault, rank, message, data, tmp_path):
    """Every rank ends with the exit code of the rank that has told it."""
    given = arguments(data, tmp_path / "run")
    done = run_ranks("tests.trainer.rank_faults", rank, fault, *given, ranks=2)
    assert done.code == 2
    assert done.output.count(message) == 1, done.output
    assert f"rank {rank} on {HOST}: " in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_an_error_of_all_ranks_is_told_once(data, tmp_path):
    done = run_ranks("fipo_megatron.train", arguments(data, tmp_path / "run", "typo=1"), ranks=2)
    assert done.code == 2
    assert done.output.count("typo = 1: unknown key") == 1, done.output


def test_an_unexpected_error_of_one_rank_ends_the_others(data, tmp_path):
    """The rank prints the traceback, the other one a line; before, it waited for half an hour in a collective."""
    given = arguments(data, tmp_path / "run", "actor.parallel.tensor_parallel=2")
    done = run_ranks("tests.trainer.rank_faults", 1, "fails_unexpectedly", *given, ranks=2)
    assert done.code == 1
    assert done.output.count("Traceback") == 1
    assert done.output.count(f"rank 1 on {HOST}: TypeError: a fault of the program") == 1


def test_a_rank_whose_event_loop_is_blocked_is_not_waited_for(data, tmp_path):
    """Its process lives, but saving what was sampled would wait for it."""
    given = arguments(data, tmp_path / "run", *SETTINGS, "checkpoint.save_every=0")
    done = run_ranks("tests.trainer.rank_faults", 1, "blocks_its_event_loop", *given, ranks=2)
    assert done.code == 1
    silent = f"rank 1 has sent no heartbeat for {SILENCE_SECONDS} s; see its log"
    assert f"LostRankError: {silent}" in done.output
    assert "rank_faults.py" in (tmp_path / "run" / "stacks" / "rank-0001.txt").read_text()
    assert "what was sampled so far" not in done.output
    assert "Traceback" not in done.output
