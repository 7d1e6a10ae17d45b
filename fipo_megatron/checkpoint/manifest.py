"""What a checkpoint says of the run that wrote it: readable without Megatron, before anything is built."""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.weights.architecture import Architecture

FORMAT = 1
FILE = "run/manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "safetensors", "fipo-megatron")


@dataclass(frozen=True)
class Manifest:
    """Of a checkpoint.

    Attributes:
        step: The next one.
        cursor: Prompts given so far.
        leaders: How many samplers were saved.
        world_size: Ranks that saved it.
        parallel: The layout that saved it.
        schedule: Of the learning rate.
        skipped_steps: Optimizer steps that were skipped so far.
        architecture: Of the model.
        config: Of the run.
        packages: Versions.
        sampled_ahead: Whether it holds the responses of the next step.
        roll_backs: How often the run had returned to an earlier checkpoint before.
        learning_rate_factor: Of these returns.
        format: Of this file.
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
    sampled_ahead: bool = False
    roll_backs: int = 0
    learning_rate_factor: float = 1.0
    format: int = FORMAT

    def write(self, checkpoint: Path) -> None:
        """Into a checkpoint; the directory ``run`` exists."""
        (checkpoint / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Of a checkpoint.

        Raises:
            ValueError: there is none, or another program wrote it.
        """
        try:
            values = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{checkpoint / FILE}: cannot be read: {error}") from None
        if values.get("format") != FORMAT:
            raise ValueError(f"{checkpoint / FILE}: has format {values.get('format')}, expected {FORMAT}")
        return cls(**values | {"config": _with_current_keys(values["config"])})


_MOVED_FROM_RUN = ("save_every", "async_save", "keep_last", "keep_best", "optimizer_sharding", "export_every", "resume")
"""Keys that manifests of before version 0.1.0 have in section ``run``; they are in section ``checkpoint`` now."""


def _with_current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of an older manifest under today's keys."""
    run = dict(config.get("run", {}))
    moved = {key: run.pop(key) for key in _MOVED_FROM_RUN if key in run}
    return config | {"run": run, "checkpoint": config.get("checkpoint", {}) | moved}


def plain(value: Any) -> Any:
    """As it comes back from JSON, so that it can be compared with what does."""
    return json.loads(json.dumps(value, default=str))


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """For the manifest."""
    found: dict[str, Any] = plain(asdict(architecture))
    return found


def package_versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of all that were published, the newest first."""
    found = [(int(match[1]), path) for path in directory.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def name_of(step: int) -> str:
    """Of the directory."""
    return f"step-{step:06}"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys that changed, one line each."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} → {after}")
    return lines
