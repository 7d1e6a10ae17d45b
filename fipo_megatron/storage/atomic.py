"""Writes files atomically and sets damaged or superseded ones aside."""

from __future__ import annotations

import os
from pathlib import Path


def partial_of(target: Path) -> Path:
    """Returns the hidden path beside ``target`` under which it is written before it takes its name."""
    return target.with_name(f".{target.name}.partial")


def write_atomic(target: Path, content: bytes | str) -> None:
    """Writes a file so that readers, and a crash, see the old content or the new one, never a part.

    Writes to a hidden file in the same directory, syncs it to disk and renames it.

    Args:
        target: The file to write or replace; its directory must exist.
        content: Bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    partial = partial_of(target)
    if partial.is_dir() and not partial.is_symlink():
        set_aside(partial, "damaged")
    partial.unlink(missing_ok=True)  # left by a killed process; a link would be followed
    with partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def set_aside(path: Path, reason: str) -> Path:
    """Renames a file or directory to the first free name ``REASON-NAME-N`` beside it; removes nothing.

    Args:
        path: File or directory to rename.
        reason: One word that begins the new name, such as ``damaged``.

    Returns:
        The new path.
    """
    aside = free_name(path, reason)
    path.rename(aside)
    return aside


def free_name(path: Path, reason: str) -> Path:
    """Returns the first path ``REASON-NAME-N`` beside a path that does not exist."""
    number = 0
    while os.path.lexists(aside := path.with_name(f"{reason}-{path.name}-{number}")):
        number += 1
    return aside
