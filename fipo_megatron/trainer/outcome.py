"""The file that says how the last run in an output directory has ended; launchers such as torchrun hide exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from fipo_megatron.storage.atomic import set_aside, write_atomic

logger = logging.getLogger(__name__)
FILE = "outcome.json"
"""Name of the file in ``run.output``; it does not exist while a run goes on, or if it was killed."""

Outcome = Literal["complete", "stopped", "collapsed", "failed"]


def remove_outcome(output: Path) -> None:
    """Removes the outcome of an earlier run; something else under its name is set aside."""
    path = output / FILE
    if path.is_dir() and not path.is_symlink():
        logger.warning("%s: is a directory; it is now %s", path, set_aside(path, "damaged"))
    path.unlink(missing_ok=True)


def write_outcome(output: Path, outcome: Outcome, step: int, exit_code: int) -> None:
    """Writes the outcome of a run; logs a warning if that fails.

    Args:
        output: Output directory of the run.
        outcome: ``complete``; ``stopped`` by a signal; ``collapsed``, ended by the collapse alarm; or ``failed``.
        step: Number of the next step.
        exit_code: Exit code of every rank.
    """
    content = {"outcome": outcome, "step": step, "exit_code": exit_code}
    try:
        write_atomic(output / FILE, json.dumps(content) + "\n")
    except OSError as error:
        logger.warning("%s: cannot be written: %s", output / FILE, error)
