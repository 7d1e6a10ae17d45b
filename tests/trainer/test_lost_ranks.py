"""Ranks that are stopped, killed or fail alone: the others say what has happened, and nothing of the run is left.

``FIPO_LOST_RANKS=all`` stops and kills each rank in each phase under torchrun, and prints a table with ``pytest -rP``.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.runs import ROOT, arguments, command, metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SILENCE_SECONDS = 6
PHASES = {"generate": "generate:2", "update": "update:2", "save": "checkpoint_write:1"}
LAYOUTS = {"DP2": [], "TP2": ["actor.parallel.tensor_parallel=2"]}
ALL = list(itertools.product(("SIGSTOP", "SIGKILL"), LAYOUTS, PHASES, (0, 1)))
SOME = [("SIGSTOP", "DP2", "generate", 1), ("SIGSTOP", "TP2", "update", 0), ("SIGKILL", "TP2", "save", 1)]
SELECTED = ALL if os.environ.get("FIPO_LOST_RANKS") == "all" else SOME
STORES = {"torchrun": {}, "rank 0": {"TORCHELASTIC_USE_AGENT_STORE": "False"}}


def processes(home):
    """Returns the numbers of all processes with this home directory, which every process of a run inherits."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in (path / "environ").read_bytes():
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                found[int(path.name)] = state, (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def started(data, home, *overrides, **environment):
    """Starts a run of two ranks under torchrun; its verifiers are child processes."""
    settings = (f"rollout.silence_seconds={SILENCE_SECONDS}", "checkpoint.save_every=2", *overrides)
    return subprocess.Popen(
        command(data, home / "run", *settings, ranks=2),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(home)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def watch(process, home, number):
    """Waits until the run has ended; returns the seconds since a rank was stopped or had ended."""
    since, ranks = None, {}
    while process.poll() is None or processes(home):
        now = processes(home)
        ranks |= {pid: command for pid, (_, command) in now.items() if "fipo_megatron.train " in command}
        ranks = {pid: command for pid, command in ranks.items() if "distributed.run" not in command}
        hit = [pid for pid in ranks if now.get(pid, ("Z", ""))[0] in ("T" if number == signal.SIGSTOP else "ZX")]
        if since is None and hit:
            since = time.monotonic()
        time.sleep(0.02)
    return time.monotonic() - since


@pytest.mark.parametrize(("name", "layout", "phase", "rank"), SELECTED)
def test_a_lost_rank_ends_the_run(name, layout, phase, rank, data, tmp_path):
    """A stopped rank counts as lost after ``rollout.silence_seconds``, a killed one at once."""
    number = signal.Signals[name]
    process = started(data, tmp_path, *LAYOUTS[layout], FIPO_FAIL_AT=f"{PHASES[phase]}:{rank}:{name}")
    seconds = watch(process, tmp_path, number)
    said = process.communicate()[0]
    what = {"SIGSTOP": "has given no sign of life for rollout.silence_seconds = 6 s", "SIGKILL": "was killed"}[name]
    told = [line for line in said.splitlines() if f"rank {rank} on" in line and what in line]
    print(f"\n| {layout} | {phase} | {rank} | {name} | {seconds:.1f} | {re.sub(r'^.*ERROR ', '', ' '.join(told))} |")
    assert process.returncode == 1, said
    assert len(told) == 1, said
    assert "resume from its last checkpoint" in told[0]
    assert "Traceback" not in re.sub(r"(?s)Traceback.*ChildFailedError", "", said), "only torchrun's own"
    assert not processes(tmp_path)
