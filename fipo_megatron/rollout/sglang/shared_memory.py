"""Files that an SGLang server leaves in shared memory.

A server is ended with SIGKILL, by itself as well, and then removes none of its files. SGLang 0.5.23 leaves 16 KB of
load statistics and a semaphore for each start; it removes them only in its own CI.
"""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path("/dev/shm")
LEFT = ("sglang_loads_", "sem.mp-")
"""Beginnings of their names. Other files that a server maps, such as tensors of the trainer, are not its own."""


def files_of_session(session: int) -> set[Path]:
    """Returns the files that processes of a session have mapped now, as far as the processes can be inspected."""
    mapped: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) != session:
                continue
            maps = (process / "maps").read_text(encoding="utf-8", errors="replace")
        except OSError:  # the process has ended, or is another user's
            continue
        # A semaphore is created under a temporary name and linked to its own; the inode is the same.
        mapped |= {int(line.split(maxsplit=5)[4]) for line in maps.splitlines() if f" {DIRECTORY}/" in line}
    try:
        names = [path for path in DIRECTORY.iterdir() if path.name.startswith(LEFT)] if mapped else []
    except OSError:
        return set()
    return {path for path in names if _inode(path) in mapped}


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
