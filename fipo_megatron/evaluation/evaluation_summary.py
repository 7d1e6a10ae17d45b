"""The result of an evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fipo_megatron.evaluation.estimates import LEVEL, Estimate
from fipo_megatron.evaluation.results import DataSetResult, Evaluation, write_problems
from fipo_megatron.storage.atomic import write_atomic

SUMMARY, PROBLEMS, AMPLIFY = "summary.json", "problems.jsonl", "amplify.json"


def table(evaluation: Evaluation) -> str:
    """Formats one row per data set, aligned: percentages with their intervals, then pass@k by k."""
    data_sets = evaluation.data_sets()
    k = data_sets[0].samples
    heads = ["data set", "problems", f"avg@{k}", f"cons@{k}", f"pass@{k}", "tokens", "truncated"]
    rows = [
        [
            data_set.name,
            str(data_set.problems),
            *map(percent, (data_set.avg, data_set.cons, data_set.passes[k])),
            f"{data_set.response_tokens:.1f}",
            f"{data_set.truncated_fraction:.1%}",
        ]
        for data_set in data_sets
    ]
    text = aligned([heads, *rows])
    if k > 1:
        by_k = [[data_set.name, *map(percent, data_set.passes.values())] for data_set in data_sets]
        text += "\n\n" + aligned([["data set", *(f"pass@{k}" for k in data_sets[0].passes)], *by_k])
    if evaluation.failed_checks:
        text += f"\n\n{evaluation.failed_checks} responses whose check failed are left out."
    return f"{text}\n\nIn brackets: {LEVEL:.0%} bootstrap intervals over problems."


def percent(mean: Estimate) -> str:
    """Formats a fraction in percent, with its interval in brackets."""
    if mean.value is None:
        return "–"
    if mean.low is None or mean.high is None:
        return f"{mean.value:.1%}"
    return f"{mean.value:.1%} ({100 * mean.low:.1f}–{100 * mean.high:.1f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells in columns; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def summary(evaluation: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of ``summary.json``, none of which depends on time.

    Args:
        evaluation: Result of the evaluation.
        settings: Settings of the evaluation by name, copied into the summary.
    """
    return {
        **settings,
        "interval": LEVEL,
        **({"failed_checks": evaluation.failed_checks} if evaluation.failed_checks else {}),
        "scalars": evaluation.scalars(),
        "data_sets": {data_set.name: _data_set_values(data_set) for data_set in evaluation.data_sets()},
    }


def _data_set_values(data_set: DataSetResult) -> dict[str, Any]:
    values = asdict(data_set)
    passes = {str(k): value for k, value in values.pop("passes").items()}
    del values["name"]
    return values | {"pass": passes}


def write(directory: Path, evaluation: Evaluation, settings: Mapping[str, Any]) -> None:
    """Writes ``problems.jsonl``, then ``summary.json``, so that a summary marks a complete evaluation."""
    write_problems(directory / PROBLEMS, evaluation.problems)
    write_atomic(directory / SUMMARY, json.dumps(summary(evaluation, settings), indent=2) + "\n")
