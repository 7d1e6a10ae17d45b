"""The HTML page of one or several runs: its data, in the frame of all pages."""

from __future__ import annotations

import math
from typing import Any

from fipo_megatron.report.charts import Chart, bands_shown, charts_of, explained, lines_shown
from fipo_megatron.report.frame import PARTS, assemble
from fipo_megatron.report.runs import Run, Series, differences
from fipo_megatron.report.series import MAX_POINTS, thin, thin_together
from fipo_megatron.report.summary import headline, last_values
from fipo_megatron.report.tokens import chosen_responses
from fipo_megatron.report.verdict import compare

SCRIPTS = ("chart.js", "curves.js", "tokens.js", "main.js")


def render(runs: list[Run], *, smooth: int, responses: int, token_limit: int) -> str:
    """Returns the HTML of the page.

    Args:
        runs: Runs in the order of their colours.
        smooth: Initial smoothing window in steps.
        responses: Maximum number of responses per run in the token view.
        token_limit: Maximum number of tokens per response.
    """
    data = page_data(runs, smooth=smooth, responses=responses, token_limit=token_limit)
    return assemble("Report", PARTS / "runs.html", [PARTS / name for name in SCRIPTS], data)


class StepTable:
    """The distinct step arrays of the page: most tags of a run share theirs."""

    def __init__(self) -> None:
        self.arrays: list[list[int]] = []
        self._index: dict[bytes, int] = {}

    def packed(self, series: Series) -> dict[str, Any]:
        """Returns a series in the format of the page."""
        key = series.steps.tobytes()
        if key not in self._index:
            self._index[key] = len(self.arrays)
            self.arrays.append(series.steps.tolist())
        return {"s": self._index[key], "v": _rounded_all(series)}

    def thinned(self, series: Series) -> dict[str, Any]:
        """Returns a series of any length in the format of the page, with extremes if it was thinned."""
        thinned = thin(series)
        ends = {name: _rounded_all(end) for name, end in zip(("low", "high"), thinned.extremes or (), strict=False)}
        return self.packed(thinned.line) | ends


def _rounded_all(series: Series) -> list[float | None]:
    return [_rounded(value) for value in series.values.tolist()]


def edge(series: Series, side: int) -> Series:
    """Thins a series for the lower (0) or upper (1) edge of a band."""
    thinned = thin(series)
    return thinned.extremes[side] if thinned.extremes else thinned.line


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def page_data(runs: list[Run], *, smooth: int, responses: int, token_limit: int) -> dict[str, Any]:
    """Returns the data of the page."""
    steps = StepTable()
    verdict = compare(runs)
    charts = [packed for chart in charts_of(runs) for packed in _charts(chart, runs, steps)]
    chosen = [chosen_responses(run, responses, token_limit) for run in runs]
    longest = max((len(series) for run in runs for series in run.series.values()), default=0)
    notes = [note for run in runs for note in run.notes]
    if longest > MAX_POINTS:
        notes.append(
            f"Long curves ({longest:,} points) are thinned to {MAX_POINTS:,} numbers: a line is the mean over an"
            " interval of steps, the shade around it reaches from the smallest to the largest value."
        )
    return {
        "smooth": smooth,
        "notes": notes,
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "alarms": [{"step": a.step, "action": a.action, "reason": a.reason} for a in run.alarms],
            }
            for run in runs
        ],
        "verdict": verdict.sentences,
        "leader": verdict.leader,
        "equals": list(verdict.equals),
        "headline": headline(runs),
        "differences": [{"key": key, "values": values} for key, values in differences(runs)],
        "configured": [bool(run.config) for run in runs],
        "table": last_values(runs),
        "charts": charts,
        "steps": steps.arrays,
        "range": _range(runs),
        "responses": [row | {"run": i} for i, (rows, _) in enumerate(chosen) for row in rows],
        "omitted": [text for _, text in chosen],
    }


def _range(runs: list[Run]) -> list[int]:
    """Returns the first and last step of all runs; they differ."""
    ends = [int(series.steps[i]) for run in runs for series in run.series.values() for i in (0, -1)]
    first = min(ends, default=0)
    return [first, max(first + 1, max(ends, default=0))]


def _charts(chart: Chart, runs: list[Run], steps: StepTable) -> list[dict[str, Any]]:
    """Returns one chart of all runs, or one chart per run if lines are stacked."""
    if not chart.stacked:
        return [_chart(chart, runs, steps)]
    charts = []
    for i, run in enumerate(runs):
        lines = _stack(chart, run, steps)
        if lines:
            title = f"{chart.title}: {run.name}" if len(runs) > 1 else chart.title
            charts.append(
                _head(chart) | {"key": f"{chart.key}-{i}", "title": title, "only": i, "lines": lines, "bands": []}
            )
    return charts


def _head(chart: Chart) -> dict[str, Any]:
    return {
        "key": chart.key,
        "section": chart.section,
        "title": chart.title,
        "log": chart.log,
        "percent": chart.percent,
        "marks": chart.marks,
        "stacked": chart.stacked,
        "legend": chart.legend,
        "explained": [list(row) for row in explained(chart)],
    }


def _chart(chart: Chart, runs: list[Run], steps: StepTable) -> dict[str, Any]:
    lines, bands = [], []
    for i, run in enumerate(runs):
        for slot, line in enumerate(lines_shown(chart, len(runs))):
            if len(run.get(line.tag).finite()):
                packed = steps.thinned(run.get(line.tag))
                lines.append({"run": i, "slot": slot, "label": line.label, "tag": line.tag} | packed)
        for level, band in enumerate(bands_shown(chart, len(runs))):
            low, high = run.get(band.low), run.get(band.high)
            if len(low.finite()) and len(high.finite()):
                edges = {"low": steps.packed(edge(low, 0)), "high": steps.packed(edge(high, 1))}
                bands.append({"run": i, "level": level, "label": band.label} | edges)
    return _head(chart) | {"only": None, "lines": lines, "bands": bands}


def _stack(chart: Chart, run: Run, steps: StepTable) -> list[dict[str, Any]]:
    """Returns the stacked lines of a run; a part that a step does not have is 0."""
    there = [(slot, line, run.get(line.tag).finite()) for slot, line in enumerate(chart.lines)]
    there = [part for part in there if len(part[2])]
    if not there:
        return []
    every = sorted(set().union(*(series.steps.tolist() for _, _, series in there)))
    aligned = thin_together([series.filled(every) for _, _, series in there])
    return [
        {"run": 0, "slot": slot, "label": line.label, "tag": line.tag} | steps.packed(series)
        for (slot, line, _), series in zip(there, aligned, strict=True)
    ]
