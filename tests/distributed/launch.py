"""Starts a worker module on several gloo ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed import layout_cases
from tests.processes import ROOT, run_ranks


def on_ranks(module: str, ranks: int, *arguments: str, references: Path | None = None, timeout: float = 500) -> str:
    """Calls ``module.main(*arguments)`` on forked ranks and returns what they print; fails if any rank fails.

    ``references`` is the directory of ``layout_cases.write_references``; without it, a rank computes what it needs.
    """
    environment = {layout_cases.DIRECTORY: str(references)} if references else {}
    done = run_ranks(module, *arguments, ranks=ranks, environment=environment, timeout=timeout)
    assert done.code == 0, done.output[-6000:]
    return done.output


def torchrun(module: str, ranks: int, *arguments: str, timeout: float = 500) -> str:
    """Runs ``python -m module`` under torchrun and returns what it prints; fails if any rank fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
