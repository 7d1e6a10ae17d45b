"""Locks an output directory, so that two programs do not write into it at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fipo_megatron.storage.atomic import set_aside

logger = logging.getLogger(__name__)
FILE = ".lock"
"""Name of the lock file in its directory; it names the process that holds the lock."""

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class OutputInUseError(OSError):
    """Raised if another process writes into the directory; the message names it."""


@contextmanager
def lock_output(directory: Path) -> Iterator[None]:
    """Creates a directory if it does not exist, and holds its lock during the block.

    The lock is ``flock`` on :data:`FILE`. The system releases it when the process ends, however it ends. On a file
    system without locks, a warning says that the directory is not protected.

    Raises:
        OutputInUseError: Another process holds the lock.
        OSError: The directory cannot be created or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = _acquire(directory / FILE)
    try:
        yield
    finally:
        with suppress(OSError):
            (directory / FILE).unlink()  # before the release, so that nobody has locked it yet
        os.close(handle)


def _acquire(file: Path) -> int:
    """Returns the descriptor of the locked file."""
    while True:
        if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
            set_aside(file, "damaged")
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    raise OutputInUseError(
                        f"{file.parent}: {_holder(handle)} is writing into it; wait until that process ends, or choose "
                        "another output"
                    ) from None
                if error.errno not in _UNSUPPORTED:
                    raise
                logger.warning("%s: cannot be locked (%s): start no second run on it", file.parent, error.strerror)
            if _is_at(handle, file):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed the file since it was opened


def _is_at(handle: int, file: Path) -> bool:
    """Returns whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """Describes the process that holds the lock, as far as it has written its name."""
    try:
        values = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(values['pid'])} on {str(values['host'])[:200]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
