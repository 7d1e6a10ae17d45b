"""The stacks of all threads of a rank, in a file of its own: why a run hangs stands nowhere else.

SIGUSR2 has them written at any time, also while a thread holds Python's interpreter lock. Python's ``faulthandler``
belongs to the whole process, and so does the file here.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

DIRECTORY = "stacks"
"""Name of the directory in ``run.output``."""

_file: TextIO | None = None


@contextmanager
def stacks_to_file(output: Path, rank: int) -> Iterator[None]:
    """Opens a block in which stacks are written to ``stacks/rank-0000.txt``; an empty file is removed at its end.

    Args:
        output: Output directory of the run.
        rank: Rank of this process.

    Raises:
        OSError: The file cannot be opened.
    """
    global _file
    path = output / DIRECTORY / f"rank-{rank:04}.txt"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        _file = file
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)
            _file = None
    with suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
            path.parent.rmdir()  # by the last rank


def write_stacks(reason: str) -> None:
    """Writes the stacks of all threads to the file of this rank; to standard error before it is open."""
    file = _file or sys.stderr
    with suppress(OSError, ValueError):
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {reason}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
