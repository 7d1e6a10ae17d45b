"""Rollbacks of a run to an earlier checkpoint after an alarm, recorded in ``roll_backs.jsonl`` for resumed runs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.storage.atomic import set_aside, write_atomic
from fipo_megatron.storage.json_lines import cut_rows, is_number, read_rows

logger = logging.getLogger(__name__)
FILE = "roll_backs.jsonl"


@dataclass(frozen=True)
class Rollback:
    """One rollback.

    Attributes:
        number: Number of the rollback, from 1.
        step: Step in which the alarm was raised.
        to: Step of the checkpoint that was restored.
        cursor: Number of prompts consumed before the rollback; those that led to the collapse are not used again.
        learning_rate_factor: Product of the learning-rate factors of all rollbacks so far.
        reason: Reason of the alarm; empty in files of before version 0.1.0.
    """

    number: int
    step: int
    to: int
    cursor: int
    learning_rate_factor: float
    reason: str = ""


_FIELDS = {field.name for field in fields(Rollback)}


def read(output: Path) -> list[Rollback]:
    """Reads the usable rows of a run's rollbacks in order; changes nothing."""
    return [Rollback(**row) for row in read_rows(output / FILE, _problem)]


def set_bad_rows_aside(output: Path) -> None:
    """Moves the rows that cannot be used to a file beside; see :func:`.storage.json_lines.cut_rows`."""
    cut_rows(output / FILE, math.inf, check=_problem)


def _problem(row: dict[str, Any]) -> str:
    """Returns why a row is no rollback; an empty string if it is one."""
    if not _FIELDS - {"reason"} <= row.keys() <= _FIELDS:
        return f"has the keys {', '.join(row)}"
    for name in ("number", "step", "to", "cursor"):
        if type(row[name]) is not int or row[name] < (name == "number"):
            return f"has {name} {row[name]!r}"
    factor = row["learning_rate_factor"]
    if not is_number(factor) or not 0 < factor < math.inf:
        return f"has learning_rate_factor {factor!r}"
    if not isinstance(row.get("reason", ""), str):
        return "has a reason that is no text"
    return "" if row["to"] <= row["step"] else f"returns from step {row['step']} to step {row['to']}"


def write(output: Path, events: Sequence[Rollback]) -> None:
    """Writes all rollbacks of a run; they are on disk when this returns."""
    write_atomic(output / FILE, "".join(json.dumps(asdict(event)) + "\n" for event in events))


def set_aside_collapsed(checkpoints: Path, events: Sequence[Rollback]) -> None:
    """Renames the checkpoints that rollbacks have left behind; removes nothing and may be called again.

    A rollback is complete if a later checkpoint was saved: then nothing is left to rename, whatever a damaged row says.
    """
    for event in events:
        found = dict(_rollbacks_before(checkpoints))
        steps = {step for step, _ in found}
        if event.to not in steps or max(found.values()) >= event.number:
            continue
        for step, path in found:
            if step > event.to:
                logger.warning("%s is %s now", path, set_aside(path, "collapsed").name)


def _rollbacks_before(checkpoints: Path) -> Iterator[tuple[tuple[int, Path], int]]:
    """Yields step and path of each checkpoint, and the number of rollbacks of the run before it was saved.

    Checkpoints with a damaged manifest are left out; that is reported when they are loaded.
    """
    for step, path in manifest.list_checkpoints(checkpoints):
        with suppress(ValueError):
            yield (step, path), Manifest.read_verified(path).rollbacks


def pending(events: Sequence[Rollback], saved: Manifest) -> Rollback | None:
    """Returns the last rollback to this very checkpoint that happened after it was saved."""
    return next((e for e in reversed(events) if e.number > saved.rollbacks and e.to == saved.step), None)


def done(events: Sequence[Rollback], rollbacks: int) -> list[Rollback]:
    """Returns the first ``rollbacks`` rollbacks, of which rows may be lost."""
    return [event for event in events if event.number <= rollbacks]
