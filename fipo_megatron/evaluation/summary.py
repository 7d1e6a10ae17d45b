"""The result of an evaluation for people, as a table, and for programs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fipo_megatron.evaluation.estimates import LEVEL, Estimate
from fipo_megatron.evaluation.results import DataSetResult, Evaluation, write_problems
from fipo_megatron.storage.atomic import write_atomic

SUMMARY, PROBLEMS = "summary.json", "problems.jsonl"


def table(found: Evaluation) -> str:
    """Aligned, one row per data set; percentages with their intervals, then pass@k by k."""
    data_sets = found.data_sets()
    k = data_sets[0].samples
    heads = ["data set", "problems", f"avg@{k}", f"cons@{k}", f"pass@{k}", "tokens", "truncated"]
    rows = [
        [
            one.name,
            str(one.problems),
            *map(_percent, (one.avg, one.cons, one.passes[k])),
            f"{one.response_tokens:.1f}",
            f"{one.truncated_fraction:.1%}",
        ]
        for one in data_sets
    ]
    text = _aligned([heads, *rows])
    if k > 1:
        by_k = [[one.name, *map(_percent, one.passes.values())] for one in data_sets]
        text += "\n\n" + _aligned([["data set", *(f"pass@{k}" for k in data_sets[0].passes)], *by_k])
    return f"{text}\n\nIn brackets: {LEVEL:.0%} bootstrap intervals over problems."


def _percent(one: Estimate) -> str:
    if one.value is None:
        return "–"
    if one.low is None or one.high is None:
        return f"{one.value:.1%}"
    return f"{one.value:.1%} ({100 * one.low:.1f}–{100 * one.high:.1f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def summary(found: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``summary.json`` holds; nothing of it depends on time.

    Args:
        found: The result.
        settings: What was evaluated, and how.
    """
    return {
        **settings,
        "interval": LEVEL,
        "scalars": found.scalars(),
        "data_sets": {one.name: _of_data_set(one) for one in found.data_sets()},
    }


def _of_data_set(one: DataSetResult) -> dict[str, Any]:
    values = asdict(one)
    passes = {str(k): value for k, value in values.pop("passes").items()}
    del values["name"]
    return values | {"pass": passes}


def write(directory: Path, found: Evaluation, settings: Mapping[str, Any]) -> None:
    """``problems.jsonl``, then ``summary.json``: where there is a summary, the evaluation is whole."""
    write_problems(directory / PROBLEMS, found.problems)
    write_atomic(directory / SUMMARY, json.dumps(summary(found, settings), indent=2) + "\n")
