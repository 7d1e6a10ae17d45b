"""The picture: the most important charts in one PNG."""

from __future__ import annotations

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.report.charts import Chart, bands_shown, charts_of, lines_shown
from fipo_megatron.report.page import edge
from fipo_megatron.report.runs import Run, Series
from fipo_megatron.report.series import smoothed, thin
from fipo_megatron.report.verdict import compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#8C6D00")
"""Colours of the runs, after Okabe and Ito for any colour vision; the same as on the page."""

_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MOST, _COLUMNS, _SENTENCES = 12, 3, 3


def draw(runs: list[Run], *, smooth: int) -> bytes:
    """Draws up to twelve charts; returns a PNG 1600 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((chart for chart in charts_of(runs) if chart.picture), key=lambda chart: chart.picture)[:_MOST]
    rows = max(1, math.ceil(len(shown) / _COLUMNS))
    sentences = compare(runs).sentences[:_SENTENCES]
    head = 0.35 + 0.21 * len(sentences) + (0.35 if len(runs) > 1 else 0)
    height = 3.3 * rows + head
    figure = Figure(figsize=(16, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    rect = (0.005, 0.005, 0.99, 1 - head / height - 0.005)
    # The engine is constrained layout, set above; matplotlib types the base class.
    figure.get_layout_engine().set(rect=rect, w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    _head(figure, runs, sentences, height)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, chart in zip(axes, shown, strict=False):
        _chart(axis, chart, runs, smooth)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _head(figure: Figure, runs: list[Run], sentences: list[str], height: float) -> None:
    from matplotlib.lines import Line2D

    first, *more = (
        _safe(textwrap.shorten(text, 200 if i else 150, placeholder=" …")) for i, text in enumerate(sentences)
    )
    figure.text(0.012, 1 - 0.12 / height, first, va="top", size=13, weight="bold")
    figure.text(0.012, 1 - 0.42 / height, "\n".join(more), va="top", size=11)
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=3) for i in range(len(runs))]
    names = [_safe(textwrap.shorten(run.name, 40, placeholder="…")) for run in runs]
    if len(runs) > 1:
        figure.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(0.006, 1 - (0.22 + 0.21 * len(sentences)) / height),
            ncols=min(len(runs), 8),
            frameon=False,
            fontsize=11,
        )


def _safe(text: str) -> str:
    """Escapes mathematics and replaces characters that matplotlib cannot draw."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def _chart(axis: Axes, chart: Chart, runs: list[Run], smooth: int) -> None:
    scale = 100.0 if chart.percent else 1.0
    window = 1 if chart.marks else smooth
    for i, run in enumerate(runs):
        for level, band in enumerate(bands_shown(chart, len(runs))):
            low, high = (edge(_smooth(run.get(tag), window), side) for side, tag in enumerate((band.low, band.high)))
            _fill(axis, low, high, scale, color=COLOURS[i % len(COLOURS)], alpha=0.16 + 0.1 * level, label=band.label)
        for slot, line in enumerate(lines_shown(chart, len(runs))):
            _line(axis, chart, run, (i, slot, len(runs)), line.tag, line.label, window)
        for alarm in run.alarms:
            axis.axvline(alarm.step, color=COLOURS[i % len(COLOURS)], ls=(0, (2, 2)), lw=1, alpha=0.8)
    axis.set_title(_safe(chart.title), loc="left", size=10.5, weight="bold")
    _scale(axis, chart, runs)
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.set_xlabel("step", size=9)
    _legend(axis, chart, len(runs))


def _smooth(series: Series, window: int) -> Series:
    return Series(series.steps, smoothed(series, window))


def _fill(axis: Axes, low: Series, high: Series, scale: float, **style: Any) -> None:
    low, high = low.finite(), high.finite()
    if len(low) and len(high):
        values = np.concatenate([low.values, high.values[::-1]]) * scale
        axis.fill(np.concatenate([low.steps, high.steps[::-1]]), values, lw=0, **style)


def _scale(axis: Axes, chart: Chart, runs: list[Run]) -> None:
    from matplotlib import ticker

    if chart.percent:
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(100))
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
    if axis.dataLim.height == 0 and axis.dataLim.y0 == 0:
        axis.set_ylim(0, 1)
    if chart.log and _positive(chart, runs):
        axis.set_yscale("log", nonpositive="mask")
        low, high = axis.get_ylim()
        if high / low > 5:
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        else:
            axis.yaxis.set_major_locator(ticker.MaxNLocator(6))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())


def _line(axis: Axes, chart: Chart, run: Run, place: tuple[int, int, int], tag: str, label: str, window: int) -> None:
    """Draws a line and its unsmoothed values; the colour marks the run, or the line if there is one run."""
    i, slot, count = place
    series = run.get(tag)
    if not len(series):
        return
    scale = 100.0 if chart.percent else 1.0
    colour = COLOURS[(i if count > 1 else slot) % len(COLOURS)]
    dash = _DASHES[slot % len(_DASHES)] if count > 1 or chart.bands else "solid"
    raw = thin(series)
    if raw.extremes:
        _fill(axis, *raw.extremes, scale, color=colour, alpha=0.2)
    elif window > 1:
        axis.plot(raw.line.steps, raw.line.values * scale, color=colour, alpha=0.25, lw=0.8)
    shown = thin(_smooth(series, window)).line
    marker = "o" if chart.marks or len(series) < 3 else ""
    axis.plot(shown.steps, shown.values * scale, color=colour, ls=dash, lw=1.6, marker=marker, ms=3.5, label=label)


def _positive(chart: Chart, runs: list[Run]) -> bool:
    """Returns whether a logarithmic scale shows some values and hides only zeros."""
    found = np.concatenate([run.get(line.tag).finite().values for run in runs for line in chart.lines])
    return bool((found >= 0).all() and (found > 0).any())


def _legend(axis: Axes, chart: Chart, runs: int) -> None:
    """Draws the legend, each label once; its lines are grey if colours mark runs."""
    handles, labels = axis.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    if not chart.legend or not first:
        return
    legend = axis.legend(
        list(reversed(first.values())), [_safe(label) for label in reversed(first)], fontsize=8.5, framealpha=0.7
    )
    if runs > 1:
        for handle in legend.get_lines():
            handle.set_color("#444444")
