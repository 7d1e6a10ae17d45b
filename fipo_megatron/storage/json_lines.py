"""Reads and cuts files of JSON lines: one object per line, each with its ``step``.

A run appends to these files while it trains, so a killed run or a bad disk leaves rows that cannot be read. Such a row
costs that row alone: it is moved to a file beside the damaged one, a warning names both, and the rest is used.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.storage.atomic import free_name, set_aside, write_atomic

logger = logging.getLogger(__name__)

Check = Callable[[dict[str, Any]], str]
"""Returns why the values of a row are invalid; an empty string if they are valid."""

_SET_ASIDE = "damaged"
_UNFINISHED = re.compile(rb'\{"step": (\d+),')


@dataclass(frozen=True)
class _BadRow:
    """A row that cannot be used.

    Attributes:
        number: Number of the line, from 1.
        line: Content of the line.
        reason: Reason, as the end of the sentence "row 3 …".
    """

    number: int
    line: bytes
    reason: str


def no_check(values: dict[str, Any]) -> str:
    """Accepts every row."""
    return ""


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_row(line: bytes, check: Check = no_check) -> dict[str, Any]:
    """Returns the object of a line.

    Raises:
        ValueError: The line is not UTF-8, not a JSON object, has no integer ``step``, or fails the check.
    """
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    if type(values.get("step")) is not int or values["step"] < 0:
        raise ValueError("has no integer step")
    if problem := check(values):
        raise ValueError(problem)
    return values


def read_rows(file: Path, check: Check = no_check) -> list[dict[str, Any]]:
    """Returns the usable rows of a file; empty without the file. Changes nothing."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_bytes().split(b"\n"):
        try:
            found.append(parse_row(line, check))
        except ValueError:
            continue
    return found


def cut_rows(file: Path, step: float, *, check: Check = no_check, increasing: bool = False) -> list[int]:
    """Removes the rows of ``step`` and later from a file, and sets rows aside that cannot be used.

    Rows that cannot be used are moved to ``damaged-NAME-N`` beside the file, with one warning. If a directory or a link
    to nothing has the name of the file, it is renamed likewise. A last line that was not finished is such a row, unless
    it belongs to ``step`` or later.

    Args:
        file: File of JSON lines; it need not exist.
        step: First step to remove.
        check: Check of the values of a row.
        increasing: Whether each step has one row, so that a step that is not larger than the one before is damage.

    Returns:
        The steps of the rows that are left.
    """
    if not is_regular(file):
        return []
    content = file.read_bytes()
    kept: list[bytes] = []
    steps: list[int] = []
    bad: list[_BadRow] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)
        if is_last and (not line or _is_unfinished_row_of(line, step)):
            continue
        try:
            found: int = parse_row(line, check)["step"]
            if found < step and increasing and steps and found <= steps[-1]:
                raise ValueError(f"has step {found} after step {steps[-1]}")
        except ValueError as error:
            bad.append(_BadRow(number, line, str(error)))
            continue
        if found < step:
            steps.append(found)
            kept.append(line + b"\n")
    if bad:
        _set_rows_aside(file, bad)
    if (rest := b"".join(kept)) != content:
        write_atomic(file, rest)
    return steps


def is_regular(path: Path) -> bool:
    """Returns whether a file exists; sets anything else of its name aside, with a warning."""
    if path.is_file():
        return True
    if os.path.lexists(path):
        aside = set_aside(path, _SET_ASIDE)
        logger.warning("%s: is not a file; it is %s now, and the file begins anew", path, aside.name)
    return False


def make_directory(path: Path) -> None:
    """Creates a directory if it does not exist; sets anything else of its name aside, with a warning."""
    if os.path.lexists(path) and not path.is_dir():
        aside = set_aside(path, _SET_ASIDE)
        logger.warning("%s: is not a directory; it is %s now", path, aside.name)
    path.mkdir(parents=True, exist_ok=True)


def _is_unfinished_row_of(line: bytes, step: float) -> bool:
    """Returns whether a last line without its end belongs to ``step`` or later: the usual trace of a killed run."""
    match = _UNFINISHED.match(line)
    return match is not None and float(match[1]) >= step


def _set_rows_aside(file: Path, bad: Sequence[_BadRow]) -> None:
    """Writes rows to a new file beside theirs, and names both in a warning."""
    aside = free_name(file, _SET_ASIDE)
    write_atomic(aside, b"".join(row.line + b"\n" for row in bad))
    shown = ", ".join(f"row {row.number} {row.reason}" for row in bad[:3])
    more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
    logger.warning("%s: %s%s; set aside in %s, the other rows are used", file, shown, more, aside.name)
