"""Replaces the checkpoint of a step by a later one of the same step, so that one of them is whole at every moment.

The later one holds more sampled responses. It is published beside the earlier one and then takes its name. If the run
is killed in between, the next start completes the exchange.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.damage import remove
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.storage.atomic import set_aside

logger = logging.getLogger(__name__)
_NAME = re.compile(r"(step-[0-9]{6,})\.again")


def path_of(directory: Path, step: int) -> Path:
    """Returns the path at which a later checkpoint of a step is published."""
    return directory / f"{manifest.name_of(step)}.again"


def exchange(later: Path) -> None:
    """Removes the earlier checkpoint, and gives the later one its name."""
    earlier = later.with_suffix("")
    if os.path.lexists(earlier):
        remove(earlier)
    later.rename(earlier)


def complete_exchanges(directory: Path) -> None:
    """Completes the exchanges of a run that was killed; sets a later checkpoint aside if it is damaged."""
    for path in sorted(directory.glob("step-*.again")):
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            Manifest.read_verified(path)
        except ValueError as error:
            logger.warning("%s: is damaged and is %s now: %s", path, set_aside(path, "damaged").name, error)
        else:
            exchange(path)
