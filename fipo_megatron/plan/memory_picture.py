"""The picture of a plan: the memory of each kind of GPU in each phase as stacked bars, beside the memory it has."""

from __future__ import annotations

import io
from typing import Any

from fipo_megatron.plan.gpu_memory import GIB, PARTS
from fipo_megatron.plan.plan import Plan

_COLOURS = {
    "parameters": "#0072B2",
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#009E73",
    "FP8 copies": "#8C6D00",
    "activations": "#D55E00",
    "temporary": "#E69F00",
    "stored log-probs": "#F0E442",
    "KV cache": "#CC79A7",
    "reserve": "#999999",
    "sleeping server": "#555555",
    "allowance": "#999999",
}


def draw(plan: Plan) -> bytes:
    """Draws the plan; returns a PNG 1200 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [(f"{gpu.name}\n{phase.name}", phase.parts) for gpu in plan.gpus for phase in gpu.phases]
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(bars)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for part, size in parts.items():
            width = size / GIB
            axis.barh(row, width, left=left, color=_COLOURS[part], edgecolor="white")
            if width > 0.05 * plan.request.gpu_bytes / GIB:
                axis.text(left + width / 2, row, f"{width:.1f}", ha="center", va="center", color="white", fontsize=8)
            left += width
    room = plan.request.gpu_bytes / GIB
    axis.axvline(room, color="black", linestyle="dashed")
    found = {part for _, parts in bars for part in parts}
    handles: list[Any] = [Patch(color=_COLOURS[part], label=part) for part in PARTS if part in found]
    handles.append(Line2D([], [], color="black", linestyle="dashed", label=f"memory of the GPU, {room:.1f} GiB"))
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("GiB per GPU")
    axis.set_title("The plan fits" if not plan.problems else "The plan does not fit", loc="left")
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
