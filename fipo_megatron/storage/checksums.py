"""SHA-256 checksums of the files of a directory, which detect damage after they were written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

FILE = "checksums.json"
"""Name of the file of checksums in its directory."""


def compute(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Computes the checksums of files in a directory: hexadecimal digests by file name."""
    return {name: digest(directory / name) for name in names}


def digest(path: Path) -> str:
    """Computes the hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path, sums: Mapping[str, str]) -> None:
    """Writes :data:`FILE` into the directory."""
    (directory / FILE).write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(directory: Path) -> dict[str, str]:
    """Reads the checksums that :func:`write` wrote; empty without the file, as in checkpoints of other programs.

    Raises:
        ValueError: The file of checksums is damaged.
    """
    file = directory / FILE
    if not os.path.lexists(file):
        return {}
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"{file}: expected the SHA-256 of every file by its name")
    return sums


def verify_file(directory: Path, name: str) -> None:
    """Compares one file of a directory with its checksum.

    Raises:
        ValueError: The file is missing or corrupt, or has no checksum.
    """
    sums = read(directory)
    if name not in sums:
        raise ValueError(f"{directory / name}: missing in {FILE}")
    if problem := _problem(directory, name, sums[name]):
        raise ValueError(problem)


def problems(directory: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Checks the files of a directory against its checksums.

    Args:
        directory: Directory with :data:`FILE`.
        rank: Rank of this process; it checks every ``ranks``-th file, from ``rank`` on.
        ranks: Number of processes that share the work.

    Returns:
        One line per file that is missing or corrupt.
    """
    try:
        sums = read(directory)
    except ValueError as error:
        return [str(error)]
    found = (_problem(directory, name, sums[name]) for name in sorted(sums)[rank::ranks])
    return [problem for problem in found if problem]


def _problem(directory: Path, name: str, expected: str) -> str:
    """Returns why a file does not match its checksum; an empty string if it does."""
    if not (directory / name).is_file():
        return f"{directory / name}: missing"
    if compute(directory, [name])[name] != expected:
        return f"{directory / name}: corrupt: its SHA-256 is not the one in {FILE}"
    return ""
