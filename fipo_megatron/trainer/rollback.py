"""Returns of a run to an earlier checkpoint after an alarm, in ``roll_backs.jsonl``: a resumed run knows of them."""

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
    """One return.

    Attributes:
        number: From 1.
        step: In which the alarm was raised.
        to: The step of the checkpoint.
        cursor: Of the prompts: those that led here are not given again.
        learning_rate_factor: Of all returns so far.
        reason: Of the alarm; empty in older files.
    """

    number: int
    step: int
    to: int
    cursor: int
    learning_rate_factor: float
    reason: str = ""


def read(output: Path) -> list[Rollback]:
    """All of a run, in order; a line that is not whole is left out."""
    file = output / FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [Rollback(**json.loads(line)) for line in lines if line.endswith("\n")]


def write(output: Path, events: Sequence[Rollback]) -> None:
    """All of a run; on the disk when this returns."""
    write_atomic(output / FILE, "".join(json.dumps(asdict(event)) + "\n" for event in events))


def set_aside_collapsed(checkpoints: Path, events: Sequence[Rollback]) -> None:
    """Renames the checkpoints that a return has left behind; nothing is removed. May be called again."""
    for event in events:
        for step, path in manifest.list_checkpoints(checkpoints):
            if step <= event.to:
                continue
            try:
                if Manifest.read(path).roll_backs >= event.number:
                    continue
            except ValueError:
                continue  # damaged: found out, and said, when it is loaded
            logger.warning("%s is %s now", path, set_aside(path, "collapsed").name)


def pending(events: Sequence[Rollback], saved: Manifest) -> Rollback | None:
    """The last return to this very checkpoint that it does not know of itself."""
    return next((e for e in reversed(events) if e.number > saved.roll_backs and e.to == saved.step), None)
