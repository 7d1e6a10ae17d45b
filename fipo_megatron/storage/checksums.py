"""SHA-256 of the files of a directory, so that what was damaged since is not taken for weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

FILE = "checksums.json"


def compute(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """By file name, hexadecimal."""
    found = {}
    for name in names:
        with (directory / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write(directory: Path, sums: Mapping[str, str]) -> None:
    """Writes :data:`FILE` into the directory."""
    (directory / FILE).write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(directory: Path) -> dict[str, str]:
    """What :func:`write` wrote; empty where the file does not exist, as in checkpoints of other programs.

    Raises:
        ValueError: it is damaged itself.
    """
    file = directory / FILE
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{file}: expected the SHA-256 of every file by its name")
    return found


def problems(directory: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Files that are not what they were, one line each; of every ``ranks`` files, this rank reads one."""
    try:
        sums = read(directory)
    except ValueError as error:
        return [str(error)]
    found = []
    for name in sorted(sums)[rank::ranks]:
        if not (directory / name).is_file():
            found.append(f"{directory / name}: missing")
        elif compute(directory, [name])[name] != sums[name]:
            found.append(f"{directory / name}: corrupt: its SHA-256 is not the one in {FILE}")
    return found
