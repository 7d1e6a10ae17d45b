"""Output of the benchmarks: a table on the screen, and a JSON file with the machine in benchmarks/results/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def median_times(functions: Mapping[str, Callable[[], Any]], repeats: Mapping[str, int]) -> dict[str, float]:
    """Returns the median seconds of each function; they run in turn, so that noise affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(max(repeats.values())):
        for name, function in functions.items():
            if turn < repeats[name]:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def kept_for_backward(function: Callable[[], Any]) -> int:
    """Returns the bytes that autograd keeps for the backward pass of ``function``."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows with equal keys as an aligned table."""
    print(f"\n{title}")
    header = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in header]
    for cells in (header, ["-" * width for width in widths], *([row[name] for name in header] for row in rows)):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def write_result(name: str, result: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Writes ``<name>.json`` into the directory, with the date and the machine; returns its path."""
    machine = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
