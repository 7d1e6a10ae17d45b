"""The chart of the quickstart's swap curves in docs/what_rl_changed.md."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.what_rl_changed_tables import DIRECTIONS
from fipo_megatron.compare.swap_curves import RECOVERED
from fipo_megatron.report.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHAT = {"selected": "selected tokens", "changed": "changed tokens"}
_MARKERS = "osD^vX"
_COLOURS_KEPT = 48


def draw(result: Mapping[str, Any]) -> bytes:
    """Draws accuracy over the shares of selected and of changed tokens, in both directions; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(DIRECTIONS), len(_WHAT), sharex=True, sharey=True)
    for line, direction in zip(axes, DIRECTIONS, strict=True):
        for axis, what in zip(line, _WHAT, strict=True):
            _curves(axis, result, direction, what)
            axis.label_outer()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(_COLOURS_KEPT).save(small, format="png", optimize=True)
    return small.getvalue()


def _curves(axis: Axes, result: Mapping[str, Any], direction: str, what: str) -> None:
    """Draws the curves of a direction, and the levels of the models alone and of 90 % of their gap."""
    from matplotlib import ticker

    first, second = ("base", "rl") if direction == "base_to_rl" else ("rl", "base")
    alone = {role: 100 * row["accuracy"] for role, row in result["alone"].items()}
    level = alone[first] + RECOVERED * (alone[second] - alone[first])
    _levels(axis, {"base alone": alone["base"], "RL alone": alone["rl"], "90 % of the gap": level}, first == "base")
    curves = [curve for curve in result["curves"] if curve["direction"] == direction]
    for number, curve in enumerate(curves):
        rows = sorted(curve["points"], key=lambda row: row[what])
        shares = [0.0, *(100 * row[what] for row in rows)]
        values = [alone[first], *(100 * row["accuracy"] for row in rows)]
        axis.plot(
            shares, values, color=COLOURS[number], marker=_MARKERS[number], ms=4.5, lw=1.5, label=curve["selector"]
        )
    axis.set_title(f"{DIRECTIONS[direction]}: {_WHAT[what]}", loc="left", size=10.5, weight="bold")
    axis.set_xlabel("share of tokens", size=9)
    axis.set_ylabel("accuracy", size=9)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(ticker.FormatStrFormatter("%g %%"))
    axis.grid(alpha=0.25, lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _levels(axis: Axes, levels: Mapping[str, float], at_the_right: bool) -> None:
    """Draws horizontal lines, with their names at the end that the curves leave free."""
    for name, level in levels.items():
        axis.axhline(level, color="#777777", lw=1, ls=(0, (4, 3)) if "alone" in name else (0, (1, 1.5)))
        end, offset, side = (1, -3, "right") if at_the_right or name == "RL alone" else (0, 3, "left")
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": side}
        axis.annotate(name, (end, level), xytext=(offset, 2), size=8, color="#555555", **where)
