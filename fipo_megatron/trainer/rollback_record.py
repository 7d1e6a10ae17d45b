"""Rollbacks of a run to an earlier checkpoint after an alarm, recorded in ``roll_backs.jsonl`` for resumed runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.storage.atomic import set_aside, write_atomic

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


def read(output: Path) -> list[Rollback]:
    """Reads all rollbacks of a run in order; an incomplete last line is left out."""
    file = output / FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [Rollback(**json.loads(line)) for line in lines if line.endswith("\n")]


def write(output: Path, events: Sequence[Rollback]) -> None:
    """Writes all rollbacks of a run; they are on disk when this returns."""
    write_atomic(output / FILE, "".join(json.dumps(asdict(event)) + "\n" for event in events))


def set_aside_collapsed(checkpoints: Path, events: Sequence[Rollback]) -> None:
    """Renames the checkpoints that rollbacks have left behind; removes nothing and may be called again."""
    for event in events:
        for step, path in manifest.list_checkpoints(checkpoints):
            if step <= event.to:
                continue
            try:
                if Manifest.read(path).rollbacks >= event.number:
                    continue
            except ValueError:
                continue  # damaged: reported when it is loaded
            logger.warning("%s is %s now", path, set_aside(path, "collapsed").name)


def pending(events: Sequence[Rollback], saved: Manifest) -> Rollback | None:
    """Returns the last rollback to this very checkpoint that happened after it was saved."""
    return next((e for e in reversed(events) if e.number > saved.rollbacks and e.to == saved.step), None)
