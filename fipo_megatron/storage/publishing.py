"""Directories that appear whole or not at all: written beside their final place, synced and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fipo_megatron.storage.atomic import partial_of


def refuse_existing(target: Path) -> None:
    """Raises what :func:`begin` would, before anything expensive; makes nothing.

    Raises:
        FileExistsError: the target exists.
        FileNotFoundError: its parent does not.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: exists; it is not overwritten")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: is no directory; {target.name} cannot be written there")


def begin(target: Path) -> None:
    """Makes the directory that :func:`publish` will rename.

    Raises:
        FileExistsError: the target exists; or another run writes it, or was killed while it did.
        FileNotFoundError: its parent does not.
    """
    refuse_existing(target)
    try:
        partial_of(target).mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{partial_of(target)}: another run writes {target.name}, or was killed while it did; then remove it"
        ) from None


def discard(target: Path) -> None:
    """Removes what was written so far, if anything is there."""
    shutil.rmtree(partial_of(target), ignore_errors=True)


def publish(target: Path) -> None:
    """Makes sure that all is on disk, and gives the directory its name.

    Raises:
        OSError: the disk is full, or something has that name by now.
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
