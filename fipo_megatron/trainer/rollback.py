"""Returns of a run to an earlier checkpoint after an alarm, in ``roll_backs.jsonl``: a resumed run knows of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest

logger = logging.getLogger(__name__)
FILE = "roll_backs.jsonl"


@dataclass(frozen=True)
class RollBack:
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


def read(output: Path) -> list[RollBack]:
    """All of a run, in order; a line that is not whole is left out."""
    file = output / FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [RollBack(**json.loads(line)) for line in lines if line.endswith("\n")]


def write(output: Path, events: Sequence[RollBack]) -> None:
    """All of a run; on the disk when this returns."""
    partial = output / f".{FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(event)) + "\n" for event in events)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(output / FILE)


def set_collapsed_aside(checkpoints: Path, events: Sequence[RollBack]) -> None:
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
            number = 0
            while (aside := path.with_name(f"collapsed-{path.name}-{number}")).exists():
                number += 1
            path.rename(aside)
            logger.warning("%s is %s now", path, aside.name)


def pending(events: Sequence[RollBack], saved: Manifest) -> RollBack | None:
    """The last return to this very checkpoint that it does not know of itself."""
    return next((e for e in reversed(events) if e.number > saved.roll_backs and e.to == saved.step), None)
