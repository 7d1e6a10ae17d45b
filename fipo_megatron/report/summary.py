"""The tables of a report: the headline and the final numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fipo_megatron.report.charts import TEXTS, text_of
from fipo_megatron.report.runs import Run
from fipo_megatron.report.verdict import LAST_STEPS, collapse, last_mean, scores, training_fall

Cell = tuple[str, str]


def headline(runs: list[Run]) -> dict[str, Any]:
    """Returns the columns, and for every run a cell per column: its text and a remark in smaller type."""
    names = sorted({name for run in runs for name, found in scores(run).items() if found})
    several = len(names) > 1
    columns = names if several else [f"{kind} held-out accuracy" for _ in names for kind in ("Final", "Best")]
    columns = [*columns, "Steps", "Final length", "Fell from its best?", "Time per step", "Alarms"]
    return {"columns": columns, "rows": [_row(run, names) for run in runs]}


def _row(run: Run, names: list[str]) -> list[Cell]:
    cells: list[Cell] = []
    for name in names:
        found = scores(run).get(name) or []
        best = max(found, key=lambda score: score.value, default=None)
        final_and_best = [
            (str(score), f"at step {score.step}") if score else ("—", "")
            for score in (found[-1] if found else None, best)
        ]
        cells += final_and_best if len(names) == 1 else [_in_one(*final_and_best)]
    length, seconds = last_mean(run.get("rollout/response_tokens_mean")), run.get("time/step").finite().values
    fall, training = collapse(run), training_fall(run)
    if fall:
        fell = ("yes", str(fall))
    elif training:
        fell = ("no", f"{training.what} fell ({training.begin} to {training.end}), held-out accuracy did not")
    else:
        fell = ("no", "")
    cells += [
        _steps(run),
        ("—", "") if math.isnan(length) else (f"{length:,.4g}", "tokens"),
        fell,
        (f"{np.median(seconds):.3g} s" if len(seconds) else "—", "median" if len(seconds) else ""),
        (f"{len(run.alarms)}", f"first at step {run.alarms[0].step}") if run.alarms else ("none", ""),
    ]
    return cells


def _in_one(final: Cell, best: Cell) -> Cell:
    return (final[0], f"{final[1]}; best {best[0]} {best[1]}") if final[1] else final


def _steps(run: Run) -> Cell:
    planned = run.planned_steps
    if planned is None or run.steps >= planned:
        return f"{run.steps}", ""
    return f"{run.steps} of {planned}", f"running, or ended early; last written {run.written:%Y-%m-%d %H:%M} UTC"


def last_values(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns every tag with description, unit, and the mean over the last steps of each run."""
    order = {tag: i for i, tag in enumerate(TEXTS)}
    tags = sorted({tag for run in runs for tag in run.series if "/" in tag}, key=lambda tag: (order.get(tag, 999), tag))
    return [
        {
            "tag": tag,
            "text": text_of(tag),
            "unit": TEXTS[tag].unit if tag in TEXTS else "",
            "values": [
                _finite(last_mean(run.get(tag), 1 if tag.startswith("evaluation/") else LAST_STEPS)) for run in runs
            ],
        }
        for tag in tags
    ]


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
