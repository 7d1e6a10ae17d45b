"""Checks that an output directory can be written before anything expensive starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fipo_megatron.storage import output_lock


def output_problems(output: Path, resume: str) -> list[str]:
    """Lists why a run cannot write its output, one line each; leaves nothing behind.

    Args:
        output: Directory ``run.output``; it need not exist.
        resume: ``never`` requires it to be new or empty.
    """
    try:
        if resume == "never" and output.is_dir() and any(path.name != output_lock.FILE for path in output.iterdir()):
            return [
                f"run.output = {output}: already holds a run; choose another, or checkpoint.resume=auto to resume it"
            ]
        existing = output
        while not existing.exists():
            existing = existing.parent
        # Permissions do not tell whether a file system allows a directory: /proc allows none to anyone.
        with tempfile.TemporaryDirectory(prefix=".fipo-", dir=existing):
            pass
    except OSError as error:
        return [f"run.output = {output}: cannot be written: {error.strerror or error}"]
    return []
