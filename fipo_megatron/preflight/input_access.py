"""Read access of this node to the model and the data, and free space for checkpoints."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fipo_megatron.checkpoint.disk_space import checkpoint_bytes
from fipo_megatron.checkpoint.manifest import list_checkpoints
from fipo_megatron.config import Config
from fipo_megatron.preflight.node_facts import InputFact
from fipo_megatron.weights.architecture import Architecture


def input_facts(config: Config, *, model_alone: bool = False) -> tuple[InputFact, ...]:
    """Returns model and data of a run. One byte of every file is read.

    Args:
        config: Configuration of the run.
        model_alone: Whether the node reads no data.
    """
    found = [
        _fact(f"model.path = {config.model.path!r}", Path(config.model.path), _model_files(Path(config.model.path)))
    ]
    if model_alone:
        return tuple(found)
    files = [("data.files", path) for path in config.data.files]
    if config.run.evaluate_every:
        files += [("evaluation.files", path) for path in config.evaluation.files]
    return tuple(found + [_fact(f"{field}: {path!r}", Path(path), iter([Path(path)])) for field, path in files])


def free_bytes(output: Path) -> int | None:
    """Returns the free space of the file system in which a directory is, or will be; None if it cannot be told."""
    try:
        return shutil.disk_usage(existing_directory(output)).free
    except OSError:
        return None


def needed_bytes(config: Config) -> int | None:
    """Returns the size of the checkpoints that the run still has to write; None without a model.

    A run keeps ``checkpoint.keep_last`` checkpoints and perhaps the best, and removes an old one only after the next is
    complete. At least one checkpoint must fit.
    """
    try:
        size = checkpoint_bytes(Architecture.from_directory(Path(config.model.path)), config.actor.dtype)
        present = len(list_checkpoints(Path(config.run.output) / "checkpoints"))
    except (OSError, ValueError):
        return None
    best = bool(config.checkpoint.keep_best and config.run.evaluate_every)
    return max(1, config.checkpoint.keep_last + best + 1 - present) * size


def existing_directory(output: Path) -> Path:
    """Returns the directory itself, or the nearest one above that exists."""
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def _model_files(path: Path) -> Iterator[Path]:
    present = {one for one in path.iterdir() if one.suffix in (".json", ".safetensors") and one.is_file()}
    yield from sorted(present | {path / "config.json"})


def _fact(field: str, root: Path, files: Iterator[Path]) -> InputFact:
    digest, total = hashlib.sha256(), 0
    try:
        for file in files:
            with file.open("rb") as opened:
                opened.read(1)
            size = file.stat().st_size
            total += size
            digest.update(f"{file.name}\0{size}\0".encode())
    except OSError as error:
        return InputFact(field, problem=f"{error.filename or root} cannot be read: {error.strerror}")
    return InputFact(field, total, digest.hexdigest()[:12])
