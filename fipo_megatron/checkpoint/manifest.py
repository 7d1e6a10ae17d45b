"""The manifest of a checkpoint: position, layout and configuration of its run; readable without Megatron.

Weights, optimizer, random generators and carry-over are files beside it: see :mod:`.checkpoint.manager`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fipo_megatron.config.renamed_keys import RENAMED_KEYS
from fipo_megatron.storage import checksums
from fipo_megatron.weights.architecture import Architecture

FORMAT = 2
FILE = "run/manifest.json"
_NAME = re.compile(r"step-([0-9]{6,})")
_LIMIT = 1 << 62
"""Limit of all numbers in a manifest, so that they fit into int64."""
_SHARDINGS = ("fully_reshardable", "dp_reshardable")
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "safetensors", "fipo-megatron")


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        step: The step that a run resumes with.
        cursor: Number of prompts consumed so far.
        leaders: Number of samplers whose carry-over was saved.
        world_size: Number of ranks that saved the checkpoint.
        parallel: ``actor.parallel`` of the run that saved it.
        schedule: State of the learning-rate schedule.
        skipped_steps: Number of optimizer steps skipped so far.
        architecture: Architecture of the model.
        config: Configuration of the run.
        packages: Package versions by name.
        prefetched: Whether the checkpoint holds responses sampled for ``step``.
        rollbacks: Number of rollbacks of the run before it was saved.
        learning_rate_factor: Product of the learning-rate factors of these rollbacks.
        data: SHA-256 of each training file by its path; empty in checkpoints that were saved without it.
        format: Version of the file's format.
    """

    step: int
    cursor: int
    leaders: int
    world_size: int
    parallel: dict[str, Any]
    schedule: dict[str, Any]
    skipped_steps: int
    architecture: dict[str, Any]
    config: dict[str, Any]
    packages: dict[str, str]
    prefetched: bool = False
    rollbacks: int = 0
    learning_rate_factor: float = 1.0
    data: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, checkpoint: Path) -> None:
        """Writes the manifest into a checkpoint whose directory ``run`` exists."""
        (checkpoint / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Reads the manifest of a checkpoint.

        Raises:
            ValueError: The file is missing or unreadable, or has an unknown format.
        """
        file = checkpoint / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected an object, found {type(values).__name__}")
        if values.get("format") not in (1, FORMAT):
            raise ValueError(f"{file}: has format {values.get('format')}, expected {FORMAT}")
        try:
            values = _from_format_1(values) if values["format"] == 1 else values
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: is not a manifest of format 1: {error!r}") from None
        if problem := _problem(values):
            raise ValueError(f"{file}: {problem}")
        return cls(**values)

    @classmethod
    def read_verified(cls, checkpoint: Path) -> Manifest:
        """Reads the manifest of a checkpoint after its checksum was compared.

        Raises:
            ValueError: The file is missing, corrupt or unreadable, or has no checksum.
        """
        checksums.verify_file(checkpoint, FILE)
        return cls.read(checkpoint)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
    "dict[str, str]": (dict,),
}
"""Types of JSON values by the annotation of a field."""


def _problem(values: dict[str, Any]) -> str:
    """Returns why values are not those of a manifest; an empty string if they are."""
    known = {one.name: one for one in fields(Manifest)}
    if unknown := sorted(values.keys() - known.keys()):
        return f"has unknown keys: {', '.join(unknown)}"
    for name, one in known.items():
        if name not in values:
            if one.default is MISSING and one.default_factory is MISSING:
                return f"has no {name}"
            continue
        value, kinds = values[name], _KINDS[str(one.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"{name} = {value!r}: expected {one.type}"
        if isinstance(value, int | float) and not 0 <= value < _LIMIT:
            return f"{name} = {value!r}: expected a number of at least 0"
    if values["world_size"] < 1 or not 0 < values.get("learning_rate_factor", 1.0) < math.inf:
        return "world_size and learning_rate_factor must be finite and more than 0"
    return _config_problem(values["config"])


def _config_problem(config: dict[str, Any]) -> str:
    """Returns why a configuration does not say how the optimizer was saved; an empty string if it does."""
    section = config.get("checkpoint")
    sharding = section.get("optimizer_sharding") if isinstance(section, dict) else None
    if sharding not in _SHARDINGS:
        return f"config.checkpoint.optimizer_sharding = {sharding!r}: expected {' or '.join(_SHARDINGS)}"
    return ""


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a manifest of format 1, written before version 0.1.0, under today's names."""
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in values["config"].items()}
    architecture = dict(values["architecture"])
    for key in RENAMED_KEYS:
        (old_section, old), (new_section, new) = key.old.split("."), key.new.split(".")
        if key.kind is None and old in config[old_section]:
            config.setdefault(new_section, {})[new] = config[old_section].pop(old)
    is_sft = config["algorithm"]["kind"] == "sft"
    config["sft"] = {"examples_per_step": config["rollout"]["prompts_per_step"] if is_sft else 512}
    if architecture.get("mixture"):
        mixture = dict(architecture["mixture"])
        architecture["mixture"] = {"top_k" if key == "chosen" else key: value for key, value in mixture.items()}
    renamed = {"sampled_ahead": "prefetched", "roll_backs": "rollbacks"}
    current = {renamed.get(name, name): value for name, value in values.items()}
    return current | {"config": config, "architecture": architecture, "format": FORMAT}


def plain(value: Any) -> Any:
    """Returns a value as it comes back from JSON, so that the two can be compared."""
    return json.loads(json.dumps(value, default=str))


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """Returns an architecture as nested dictionaries of JSON values."""
    found: dict[str, Any] = plain(asdict(architecture))
    return found


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that numbers depend on; ``not installed`` for a bare checkout."""
    return {name: _installed_version(name) for name in _PACKAGES}


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Lists step and path of every published checkpoint, newest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def name_of(step: int) -> str:
    """Returns the directory name of a step's checkpoint."""
    return f"step-{step:06}"


def differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any] | None = None, prefix: str = ""
) -> list[str]:
    """Lists the keys whose values differ, one line each with both values.

    Args:
        old: Nested values of the checkpoint.
        new: Nested values of this run.
        defaults: Values of keys that ``old`` lacks because they are newer than the checkpoint.
        prefix: Beginning of every key, for nested values.
    """
    lines, defaults = [], defaults or {}
    for key in sorted({*old, *new}):
        default = defaults.get(key)
        before, after = old.get(key, default), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, default if isinstance(default, dict) else None, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} → {after}")
    return lines
