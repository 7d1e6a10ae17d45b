"""Prompts that the processes of a host share: one reads the data, the others map the file that it has written.

The file is in the directory for temporary files (``TMPDIR``). Each process that uses it holds a shared lock (``flock``)
on it, which ends with the process. A process that ends, or that begins to read, removes the files without a lock. A
process that is killed therefore blocks no other one, and its file is removed later.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.data.prompt_table import PromptTable, map_batches, write_batches
from fipo_megatron.data.prompts import DataError

if TYPE_CHECKING:
    import pyarrow

_FAILED = b"error:"
_LONGEST_ERROR = 1 << 20
_RETRY_SECONDS = 0.01


def file_identity(path: Path) -> list[str | int]:
    """Returns path, size, time and inode of a file, one of which differs if its content may differ."""
    found = path.stat()
    return [str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def shared_prompts(key: str, read: Callable[[], Iterable[pyarrow.RecordBatch]]) -> PromptTable:
    """Returns the prompts that the first process of this host with the same key has read.

    Args:
        key: Text that determines the prompts.
        read: Reads them, as record batches of :func:`.prompt_table.record_batch`.

    Raises:
        DataError: The data are not valid. The processes that wait raise the error of the one that reads.
        OSError: The directory for temporary files cannot be used.
    """
    directory = _directory()
    file = directory / (hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + ".arrow")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if batches := _map_or_read(descriptor, file, read):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_RETRY_SECONDS)
    atexit.register(_remove_if_unused, file)
    atexit.register(os.close, descriptor)
    return PromptTable(batches)


def _map_or_read(
    descriptor: int, file: Path, read: Callable[[], Iterable[pyarrow.RecordBatch]]
) -> list[pyarrow.RecordBatch]:
    """Returns the batches of a file with a shared lock on it; empty if its reader was killed, or it was removed."""
    reads = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        reads = False
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for the process that reads
    if os.pread(descriptor, len(_FAILED), 0) == _FAILED:
        raise DataError(os.pread(descriptor, _LONGEST_ERROR, len(_FAILED)).decode())
    if not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat()):
        return []
    batches = map_batches(file)
    if reads and not batches:
        _remove_unused(file.parent)
        try:
            write_batches(file, read())
        except DataError as error:
            _tell(descriptor, file, error)
            raise
        batches = map_batches(file)
    if reads:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return batches


def _directory() -> Path:
    """Returns a directory that nobody but this user can write to.

    Raises:
        PermissionError: There is one of another user, or one that others can open.
    """
    directory = Path(tempfile.gettempdir()) / f"fipo_megatron-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or directory.is_symlink():
        raise PermissionError(0, "must be a directory of this user alone", str(directory))
    return directory


def _tell(descriptor: int, file: Path, error: DataError) -> None:
    """Leaves an error for the processes that have opened the file, and for no others."""
    file.unlink(missing_ok=True)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _FAILED + str(error).encode(errors="replace"), 0)


def _remove_unused(directory: Path) -> None:
    """Removes the files that no process uses."""
    for file in directory.glob("*.arrow"):
        _remove_if_unused(file)


def _remove_if_unused(file: Path) -> None:
    with suppress(OSError):  # in use, or removed by another process
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        finally:
            os.close(descriptor)
