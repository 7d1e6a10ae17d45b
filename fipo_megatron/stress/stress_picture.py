"""The picture of a stress run: throughput, seconds and memory by length, pace and drift by position."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fipo_megatron.report.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _MIB = 3, 2**20

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, str, Callable[["Axes", Rows], None], Rows]
"""Title, label of the horizontal axis, the function that draws, and the rows that it draws."""


def draw(data: Mapping[str, Any]) -> bytes | None:
    """Draws the results; returns a PNG, or None if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(data) if panel[3]]
    if not panels:
        return None
    lines = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(15, 3.6 * lines), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, label, show, rows) in zip(axes, panels, strict=False):
        show(axis, rows)
        axis.set_title(title, loc="left", size=10.5, weight="bold")
        axis.set_xlabel(label, size=9)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(data: Mapping[str, Any]) -> list[Panel]:
    engine: Rows = data.get("engine") or []
    actor = [row for row in data.get("actor") or [] if "seconds" in row]
    drift = [row for row in data.get("drift") or [] if not row.get("failure")]
    pace = [row for row in engine if row["seconds_by_position"]]
    by_length, by_position = "tokens of a sequence", "position in the response"
    return [
        ("Engine: new tokens per second", by_length, _throughput, engine),
        ("Engine: milliseconds per token", by_position, _pace, pace),
        ("Actor: seconds", by_length, _seconds, actor),
        ("Actor: largest peak of a rank in MiB", by_length, _peaks, actor),
        ("Drift: |Δ log-prob|, 99 % quantile", by_position, _drift("p99"), drift),
        ("Drift: |Δ Future-KL|, 99 % quantile", by_position, _drift("future_kl_p99"), drift),
    ]


def _lengths(rows: Rows) -> list[int]:
    return [row["length"] for row in rows]


def _throughput(axis: Axes, rows: Rows) -> None:
    axis.plot(_lengths(rows), [row["metrics"]["tokens_per_second"] for row in rows], marker="o", color=COLOURS[0])
    axis.set_ylim(bottom=0)


def _pace(axis: Axes, rows: Rows) -> None:
    for number, row in enumerate(rows):
        parts = row["seconds_by_position"]
        middles = [(part["from"] + part["to"]) / 2 for part in parts]
        paces = [1000 * part["seconds_per_token"] for part in parts]
        axis.plot(middles, paces, marker="o", ms=3, color=COLOURS[number % len(COLOURS)], label=f"{row['length']:,}")
    axis.set_ylim(bottom=0)


def _seconds(axis: Axes, rows: Rows) -> None:
    for number, (name, label) in enumerate(
        {"update": "update", "log_probs": "log-probs", "loss": "whole loss", "future_kl": "Future-KL"}.items()
    ):
        values = [row["seconds"][name] for row in rows]
        axis.plot(_lengths(rows), values, marker="o", color=COLOURS[number], label=label)
    axis.set_yscale("log")


def _peaks(axis: Axes, rows: Rows) -> None:
    for number, (name, label) in enumerate({"log_probs": "log-probs", "update": "update"}.items()):
        for kind, style in (("measured", "solid"), ("planned", "dashed")):
            shown = [row for row in rows if row["ranks"][0][kind]]
            values = [max(rank[kind][name] for rank in row["ranks"]) / _MIB for row in shown]
            marker, colour = "o" if kind == "measured" else "", COLOURS[number]
            axis.plot(_lengths(shown), values, ls=style, marker=marker, color=colour, label=f"{label}, {kind}")
    axis.set_ylim(bottom=0)


def _drift(name: str) -> Callable[[Axes, Rows], None]:
    def show(axis: Axes, rows: Rows) -> None:
        for number, row in enumerate(rows):
            middles = [(part["from"] + part["to"]) / 2 for part in row["positions"]]
            values = [part[name] for part in row["positions"]]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(middles, values, marker="o", ms=3, color=colour, label=f"{row['length']:,}")
        axis.set_ylim(bottom=0)

    return show
