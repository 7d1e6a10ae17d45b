"""Reads the files in ``run.output``, also of a run that has not ended."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import yaml

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]

SCALARS = ("metrics.jsonl", "evaluation.jsonl", "timing.jsonl")
"""Files whose rows are ``{"step": …, tag: number or null, …}``."""


class RunError(ValueError):
    """A path without a run, or an unreadable file of a run; the message names it."""


@dataclass(frozen=True)
class Series:
    """A metric over steps.

    Attributes:
        steps: Increasing step numbers, ``[n]`` int64.
        values: Values, ``[n]`` float64; NaN where the file has null: a value that is not finite or does not exist.
    """

    steps: Steps
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Returns the series without values that are not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    def at(self, step: int) -> float:
        """Returns the value of a step; NaN if there is none."""
        index = int(np.searchsorted(self.steps, step))
        return float(self.values[index]) if index < len(self) and self.steps[index] == step else float("nan")

    def filled(self, steps: list[int]) -> Series:
        """Returns the series over ``steps``, a superset of its own; missing values are 0."""
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, self.steps)] = self.values
        return Series(np.array(steps, np.int64), values)


EMPTY = Series(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Alarm:
    """A line of ``alarms.jsonl``, or of ``roll_backs.jsonl``."""

    step: int
    action: str
    reason: str


@dataclass
class Run:
    """The files of a run.

    Attributes:
        path: Directory of the run.
        name: Name of the directory, with parent directories if two runs share it.
        series: Series by tag.
        config: ``config.yaml`` flattened to dotted keys; empty without one.
        alarms: Alarms in the order of their steps.
        steps: Number of steps in the files.
        written: Time of the last write to ``metrics.jsonl``, UTC.
        notes: Remarks on the files for the reader.
    """

    path: Path
    name: str
    series: dict[str, Series]
    config: dict[str, Any]
    alarms: list[Alarm]
    steps: int
    written: datetime
    notes: list[str] = field(default_factory=list)

    def get(self, tag: str) -> Series:
        """Returns the series of a tag; empty if the run has none."""
        return self.series.get(tag, EMPTY)

    @property
    def planned_steps(self) -> int | None:
        """``run.steps`` of the configuration; None if it is not known."""
        steps = self.config.get("run.steps")
        return steps if isinstance(steps, int) else None

    @property
    def data_sets(self) -> list[str]:
        """Names of the held-out data sets."""
        parts = [tag.split("/", 1)[1].rsplit("/", 1) for tag in self.series if tag.startswith("evaluation/")]
        return sorted({name for name, *rest in parts if rest == ["avg"]})


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads runs in the order given.

    Raises:
        RunError: A path is missing or holds no run, or a file is damaged.
    """
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, _names([run.path.resolve() for run in runs]), strict=True):
        run.name = name
    return runs


def _names(paths: list[Path]) -> list[str]:
    """Returns the shortest distinct suffixes of the paths; equal paths are numbered."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(paths, 1)]


def read_run(path: Path) -> Run:
    """Reads one run; see :func:`read_runs`."""
    if not path.is_dir():
        raise RunError(f"{path}: {'is not a directory' if path.exists() else 'does not exist'}")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise RunError(f"{path}: holds no run: there is no metrics.jsonl in it")
    series: dict[str, Series] = {}
    for name in SCALARS:
        if (path / name).is_file():
            series.update(read_scalars(path / name))
    if series and not any("/" in tag for tag in series):
        raise RunError(
            f"{metrics}: none of its keys is a tag (group/name): it was written by another version of fipo_megatron"
        )
    steps = max((int(s.steps[-1]) + 1 for tag, s in series.items() if not tag.startswith("evaluation/")), default=0)
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).replace(microsecond=0)
    run = Run(path, path.name, series, read_config(path / "config.yaml"), read_alarms(path), steps, written)
    if not run.config:
        run.notes.append(f"{run.path}: no config.yaml")
    return run


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields byte offset and object of each line of a JSONL file; an incomplete last line is left out.

    Raises:
        RunError: Another line is not a JSON object.
    """
    with path.open("rb") as file:
        offset, damaged = 0, None
        for number, line in enumerate(file, 1):
            if damaged:
                raise RunError(f"{path}:{damaged}: not a JSON object, and it is not the last line")
            if line.strip():
                row = parse(line)
                if row is None:
                    damaged = number
                else:
                    yield offset, row
            offset += len(line)


def parse(line: bytes) -> dict[str, Any] | None:
    """Parses a JSON object; None if it is none. Accepts NaN and lone surrogates, which orjson rejects."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) else None


def read_scalars(path: Path) -> dict[str, Series]:
    """Reads all numbers of a file by tag; of lines with the same step, the last counts."""
    steps: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}
    for _, row in rows(path):
        step = row.get("step")
        if not isinstance(step, int) or step < 0:
            raise RunError(f"{path}: a row without a step: {str(dict(row))[:80]}")
        for tag, value in row.items():
            if tag == "step" or not (value is None or isinstance(value, int | float)):
                continue
            if tag not in steps:
                steps[tag], values[tag] = array("q"), array("d")
            steps[tag].append(step)
            values[tag].append(_number(value))
    return {tag: _ordered(np.array(steps[tag], np.int64), np.array(values[tag], np.float64)) for tag in steps}


def _number(value: float | None) -> float:
    try:
        number = float("nan") if value is None else float(value)
    except OverflowError:
        return float("nan")
    return number if np.isfinite(number) else float("nan")


def _ordered(steps: Steps, values: Floats) -> Series:
    if np.all(np.diff(steps) > 0):
        return Series(steps, values)
    unique, last = np.unique(steps[::-1], return_index=True)
    return Series(unique, values[::-1][last])


def read_alarms(path: Path) -> list[Alarm]:
    """Reads the alarms of a run."""
    found = []
    for name, action in (("alarms.jsonl", ""), ("roll_backs.jsonl", "roll_back")):
        if (file := path / name).is_file():
            found += [{"action": action, **row} for _, row in rows(file) if isinstance(row.get("step"), int)]
    return [
        Alarm(row["step"], str(row["action"]), str(row.get("reason", "")))
        for row in sorted(found, key=lambda row: row["step"])
    ]


def read_config(path: Path) -> dict[str, Any]:
    """Reads ``config.yaml`` as dotted keys; lists and empty mappings stay values."""
    if not path.is_file():
        return {}
    try:
        nested = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if nested is None:
        return {}
    if not isinstance(nested, dict):
        raise RunError(f"{path}: not a mapping")
    return dict(_flat(nested, ""))


def _flat(nested: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Returns the keys whose values differ between the runs, with the values; ``run.output`` is left out."""
    keys = sorted({key for run in runs for key in run.config} - {"run.output"})
    table = [(key, [_shown(run.config, key) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _shown(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False, default=str) if key in config else "—"
