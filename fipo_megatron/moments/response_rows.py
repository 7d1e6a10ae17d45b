"""Responses as text with their right answers, from trajectory files, evaluations and files of any other program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fipo_megatron.data.trajectory import FinishReason


class RowsError(ValueError):
    """A path without responses, or a row that is not valid; the message names it."""


@dataclass(frozen=True)
class ResponseRow:
    """A response to read.

    Attributes:
        name: Name of the response, for people.
        response: Text of the response.
        ground_truth: Right answer.
        prompt: Text of the prompt; empty if it is not recorded.
        data_source: Name of the data set.
        step: Step of the run; None if there is none.
        finish_reason: Why the response ended.
        accuracy: Recorded verdict; None without one.
        tokens: Length in tokens; None if it is not recorded.
    """

    name: str
    response: str
    ground_truth: str
    prompt: str = ""
    data_source: str = ""
    step: int | None = None
    finish_reason: FinishReason = "stop"
    accuracy: int | None = None
    tokens: int | None = None


def response_rows(paths: Sequence[Path]) -> list[ResponseRow]:
    """Reads the responses of files and directories.

    Each row of a file is a JSON object with ``response`` and ``ground_truth`` (or ``answer``); the rest is optional. A
    directory of a run has ``trajectories/``, that of a comparison ``responses.jsonl``.

    Raises:
        RowsError: A path holds no responses, or a row lacks a field.
    """
    files = [file for path in paths for file in _files(path)]
    rows = [row for file in files for row in _read(file)]
    if not rows:
        raise RowsError(f"{', '.join(map(str, files))}: hold no responses")
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if found := sorted(path.glob("trajectories/from-*.jsonl")):
        return found
    if (compared := path / "responses.jsonl").is_file():
        return [compared]
    raise RowsError(f"{path}: holds no responses; expected a .jsonl file, a run with trajectories/ or a comparison")


def _read(file: Path) -> list[ResponseRow]:
    found = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(_row(json.loads(line), f"{file.name}:{number}"))
            except (ValueError, TypeError) as error:
                if not line.endswith("\n"):
                    break  # the last row of a run that is writing
                raise RowsError(f"{file}, line {number}: {error}") from None
    return found


def _row(values: Any, place: str) -> ResponseRow:
    if not isinstance(values, dict):
        raise ValueError("is not a JSON object")
    truth = values.get("ground_truth", values.get("answer"))
    if not isinstance(values.get("response"), str):
        raise ValueError(f"response = {values.get('response')!r:.100}: must be text")
    if not isinstance(truth, str | int | float):
        raise ValueError(f"ground_truth = {truth!r:.100}: must be text or a number")
    reason = values.get("finish_reason", "stop")
    if reason not in get_args(FinishReason):
        raise ValueError(f"finish_reason = {reason!r}: must be one of {', '.join(get_args(FinishReason))}")
    name = f"{values['prompt_id']}/{values.get('sample', 0)}" if "prompt_id" in values else place
    step, accuracy, tokens = (values.get(key) for key in ("step", "accuracy", "response_tokens"))
    return ResponseRow(
        name if step is None else f"step {step}, {name}",
        values["response"],
        str(truth),
        str(values.get("prompt", "")),
        str(values.get("data_source", "")),
        step,
        reason,
        accuracy,
        tokens,
    )
