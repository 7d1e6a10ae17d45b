"""The stacks of all threads of a rank, in a file of its own: why a run hangs stands nowhere else.

They are written with Python's interpreter lock: a thread that runs meanwhile changes what is read, and the process may
crash. SIGUSR2 asks for them at any time. :data:`FORCED` has them written at once, also while a thread holds the lock;
it is for a process that is killed next. Python's ``faulthandler`` belongs to the whole process, and so does the file.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

DIRECTORY = "stacks"
"""Name of the directory in ``run.output``."""

FORCED = signal.SIGRTMIN
"""Signal on which stacks are written without the interpreter lock, in the thread that receives it."""

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
        faulthandler.register(FORCED, file=file, all_threads=True)
        try:
            with _written_when_asked():
                yield
        finally:
            faulthandler.unregister(FORCED)
            _file = None
    with suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
            path.parent.rmdir()  # by the last rank


@contextmanager
def _written_when_asked() -> Iterator[None]:
    """Opens a block in which a thread writes the stacks on SIGUSR2, also while the main thread waits in a library.

    Only the main thread can install the handler; elsewhere the signal is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, ask = os.pipe()
    os.set_blocking(ask, False)

    def wait() -> None:
        while received := os.read(asked, 64):
            if signal.SIGUSR2 in received:
                write_stacks("SIGUSR2")

    signal.signal(signal.SIGUSR2, lambda *_: None)  # also after the block, where it would end the process
    # Python writes the number of every signal that it handles into the pipe at once, before any handler runs.
    pipe = signal.set_wakeup_fd(ask, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, name="stacks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        os.close(ask)
        thread.join()
        os.close(asked)


def write_stacks(reason: str) -> None:
    """Writes the stacks of all threads to the file of this rank; to standard error before it is open."""
    file = _file or sys.stderr
    with suppress(OSError, ValueError):
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {reason}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
