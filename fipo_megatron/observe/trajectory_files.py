"""Trajectory files: right and wrong responses of a run as text, in ``trajectories/from-000000.jsonl`` and following."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.storage.json_lines import cut_rows, is_regular, make_directory

if TYPE_CHECKING:
    from fipo_megatron.actor.update_metrics import TokenPart

__all__ = ["TrajectoryFiles", "choose", "cut_rows", "row_of", "token_columns"]

_NAME = re.compile(r"from-([0-9]{6,})\.jsonl")
_DIGITS = 6
"""Significant digits of per-token numbers."""


def choose(records: Sequence[GroupRecord], count: int) -> list[str]:
    """Selects ``count`` responses by name: a right and a wrong one of each of some evenly spaced groups."""
    ordered = sorted(records, key=lambda record: record.prompt)
    groups = min(len(ordered), -(-count // 2))
    names = []
    for number in range(groups):
        record = ordered[number * len(ordered) // groups]
        for verdict in (1, 0):
            found = [n for n, accuracy in zip(record.names, record.accuracies, strict=True) if accuracy == verdict]
            names += found[:1]
    return names[:count]


def row_of(
    trajectory: Trajectory, step: int, mini_batch: int, decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Returns the row of a response.

    Args:
        trajectory: The scored response with its advantage.
        step: Step that trains on it.
        mini_batch: Number of the update that trains on it; −1: none.
        decode: Function from token ids to text.
    """
    prompt, spans = trajectory.prompt, trajectory.spans
    ends = [span.start for span in spans[1:]] + [len(trajectory.tokens)]
    return {
        "step": step,
        "prompt_id": prompt.id,
        "sample": trajectory.sample,
        "data_source": prompt.data_source,
        "prompt": decode(prompt.tokens.tolist()),
        "response": decode(trajectory.tokens.tolist()),
        "ground_truth": prompt.ground_truth,
        "reward": trajectory.reward,
        "accuracy": trajectory.accuracy,
        "advantage": None if trajectory.advantage is None else float(f"{trajectory.advantage:.{_DIGITS}g}"),
        "finish_reason": trajectory.finish_reason,
        "response_tokens": len(trajectory.tokens),
        "versions": [[span.weight_version, end - span.start] for span, end in zip(spans, ends, strict=True)],
        "mini_batch": mini_batch,
    }


def token_columns(
    trajectory: Trajectory, parts: Iterable[TokenPart], decode: Callable[[Sequence[int]], str]
) -> dict[str, list[Any]]:
    """Returns text and numbers per token of a response; null for tokens outside the loss.

    Args:
        trajectory: The response.
        parts: Values of all ranks that hold a part of it.
        decode: Function from token ids to text.
    """
    count = len(trajectory.tokens)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for part in parts:
        for name, values in part.values.items():
            found.setdefault(name, np.full(count, np.nan))[part.positions] = values
    columns: dict[str, list[Any]] = {"text": [decode([token]) for token in trajectory.tokens.tolist()]}
    columns["behaviour_log_prob"] = _numbers(trajectory.behaviour_log_probs)
    return columns | {name: _numbers(values) for name, values in found.items()}


def _numbers(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]


class TrajectoryFiles:
    """Writes trajectory files of bounded size.

    Args:
        directory: Directory of the files; created with the first row.
        file_bytes: File size in bytes after which a new file is begun.
        total_bytes: Total size in bytes beyond which the oldest files are removed, except the newest file.
    """

    def __init__(self, directory: Path, file_bytes: int, total_bytes: int) -> None:
        self._directory, self._file_bytes, self._total_bytes = directory, file_bytes, total_bytes

    def files(self) -> list[Path]:
        """Returns the files in the order of their steps; foreign files are left alone."""
        return sorted(file for file in self._directory.glob("from-*.jsonl") if _first_step(file) is not None)

    def append(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the rows of a step to one file."""
        if not rows:
            return
        make_directory(self._directory)
        found = self.files()
        if not found or found[-1].stat().st_size >= self._file_bytes:
            found.append(self._directory / f"from-{step:06}.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with found[-1].open("a", encoding="utf-8") as file:
            file.write(text)
        sizes = [path.stat().st_size for path in found]
        while len(found) > 1 and sum(sizes) > self._total_bytes:
            found.pop(0).unlink()
            sizes.pop(0)

    def cut(self, step: int) -> None:
        """Removes the rows of ``step`` and later from the files."""
        for file in reversed([file for file in self.files() if is_regular(file)]):
            if int(file.stem.partition("-")[2]) >= step:
                file.unlink()
            else:
                cut_rows(file, step)
                return


def _first_step(file: Path) -> int | None:
    """Returns the step in the name of a trajectory file; None for other names."""
    match = _NAME.fullmatch(file.name)
    return int(match[1]) if match else None
