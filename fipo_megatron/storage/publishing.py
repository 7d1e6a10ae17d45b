"""Directories that appear whole or not at all: written beside their final path, synced and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fipo_megatron.storage.atomic import partial_of


def refuse_existing(target: Path) -> None:
    """Checks that a directory can be begun, without creating anything, before expensive work.

    Raises:
        FileExistsError: The target exists.
        FileNotFoundError: The parent of the target does not exist.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists; it is not overwritten")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: is not a directory; {target.name} cannot be written there")


def begin(target: Path) -> None:
    """Creates the hidden directory that :func:`publish` renames.

    Raises:
        FileExistsError: The target exists, or another run is writing it or was killed while it was.
        FileNotFoundError: The parent of the target does not exist.
    """
    refuse_existing(target)
    try:
        partial_of(target).mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{partial_of(target)}: another run is writing {target.name}; if that run was killed, remove this directory"
        ) from None


def discard(target: Path) -> None:
    """Removes the hidden directory, if it exists."""
    shutil.rmtree(partial_of(target), ignore_errors=True)


def publish(target: Path) -> None:
    """Syncs all files to disk and renames the directory to the target.

    Raises:
        OSError: The disk is full, or the target exists by now.
    """
    partial = partial_of(target)
    refuse_existing(target)
    for path in sorted(partial.rglob("*")):
        _sync(path)
    _sync(partial)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
