"""Checks that an output directory can be written before anything expensive starts."""

from __future__ import annotations

import os
from pathlib import Path

from fipo_megatron.storage import output_lock


def output_problems(output: Path, resume: str) -> list[str]:
    """Lists why a run cannot write its output, one line each; creates nothing.

    Args:
        output: Directory ``run.output``; it need not exist.
        resume: ``never`` requires it to be new or empty.
    """
    if resume == "never" and output.is_dir() and any(path.name != output_lock.FILE for path in output.iterdir()):
        return [f"run.output = {output}: already holds a run; choose another, or checkpoint.resume=auto to resume it"]
    existing = output
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"run.output = {output}: cannot be written"]
    return []
