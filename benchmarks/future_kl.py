"""Future-KL: our scan against the paper's chunked formulation and a sequential loop.

The paper computes F as a product with the matrix of discounts γ^(k−t), 128 columns at a time (arXiv 2603.19835,
App. G): O(L²) work and, with gradients enabled, 4 L² bytes for the backward pass. F is a first-order recurrence, so
O(L) work is enough. The lower bound of the time is one read and one write of the values.

    python -m benchmarks.future_kl
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TypedDict

import torch

from benchmarks.result_table import kept_for_backward, median_times, print_table, write_result
from fipo_megatron.algorithm.future_kl import discount, future_kl

HALF_LIFE = 32.0
SHAPES = [(1, 2048), (8, 2048), (8, 8192), (8, 20_480), (1, 32_768), (8, 32_768), (1, 131_072), (8, 131_072)]
LONGEST_PRODUCT = 32_768  # a longer product takes minutes, and its graph does not fit into memory
CONTEXT_PARALLEL_SIZES = (2, 4, 8)


class Measurement(TypedDict):
    """Times in seconds, relative errors and bytes kept for backward; None for a product that is too long to compute."""

    batch: int
    length: int
    scan_s: float
    product_s: float | None
    loop_s: float
    read_write_s: float
    speedup_over_product: float | None
    speedup_over_loop: float
    scan_error: float
    product_error: float | None
    scan_kept_bytes: int
    product_kept_bytes: int
    product_kept_measured: bool


def chunked_product(values_BL: torch.Tensor, half_life: float, columns: int = 128) -> torch.Tensor:
    """Computes F in the paper's formulation, written from its description."""
    length = values_BL.shape[1]
    position = torch.arange(length)
    future_kl_BL = torch.zeros_like(values_BL)
    for first in range(0, length, columns):
        later = position[first : first + columns]
        distance = later[None, :] - position[:, None]
        discounts = torch.where(distance >= 0, torch.pow(discount(half_life), distance.clamp(min=0)), 0.0)
        future_kl_BL = future_kl_BL + values_BL[:, first : first + columns] @ discounts.T
    return future_kl_BL


def sequential_loop(values_BL: torch.Tensor, half_life: float) -> torch.Tensor:
    """Computes F with one step per token, all rows at once."""
    gamma, following = discount(half_life), torch.zeros_like(values_BL[:, 0])
    result: list[torch.Tensor] = []
    for column in reversed(values_BL.unbind(1)):
        following = column + gamma * following
        result.append(following)
    return torch.stack(result[::-1], dim=1)


def measure(batch: int, length: int) -> Measurement:
    values = torch.randn(batch, length, generator=torch.Generator().manual_seed(length)) * 0.1
    exact = sequential_loop(values.double(), HALF_LIFE)
    with_product = length <= LONGEST_PRODUCT
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "scan": lambda: future_kl(values, HALF_LIFE),
        "loop": lambda: sequential_loop(values, HALF_LIFE),
        "read_write": lambda: values * 1.0,
    }
    repeats = {"scan": 51, "loop": 3, "read_write": 51}
    if with_product:
        functions["product"] = lambda: chunked_product(values, HALF_LIFE)
        repeats["product"] = 3
    future_kl(values, HALF_LIFE)
    times = median_times(functions, repeats)
    leaf = values.clone().requires_grad_()
    fits = length <= 20_480

    def error(function: Callable[[torch.Tensor, float], torch.Tensor]) -> float:
        return float((function(values, HALF_LIFE).double() - exact).abs().max() / exact.abs().max())

    return {
        "batch": batch,
        "length": length,
        "scan_s": times["scan"],
        "product_s": times.get("product"),
        "loop_s": times["loop"],
        "read_write_s": times["read_write"],
        "speedup_over_product": times["product"] / times["scan"] if with_product else None,
        "speedup_over_loop": times["loop"] / times["scan"],
        "scan_error": error(future_kl),
        "product_error": error(chunked_product) if with_product else None,
        "scan_kept_bytes": kept_for_backward(lambda: future_kl(leaf, HALF_LIFE)),
        "product_kept_bytes": kept_for_backward(lambda: chunked_product(leaf, HALF_LIFE)) if fits else 4 * length**2,
        "product_kept_measured": fits,
    }


def exchanged_bytes(length: int, size: int) -> dict[str, int]:
    """Returns the bytes that one rank receives per sequence: our 4 float64, or a gather of float32 shifts."""
    return {"length": length, "cp": size, "ours": (size - 1) * 4 * 8, "gather": (size - 1) * length // size * 4}


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    measured = [measure(batch, length) for batch, length in SHAPES]

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.2f}"

    print_table(
        f"Future-KL forward, {torch.get_num_threads()} thread(s), τ = {HALF_LIFE:g}: median ms, relative max error",
        [
            {
                "B x L": f"{m['batch']} x {m['length']}",
                "scan": ms(m["scan_s"]),
                "chunked product": ms(m["product_s"]),
                "loop": ms(m["loop_s"]),
                "read+write": ms(m["read_write_s"]),
                "x faster": "-" if m["speedup_over_product"] is None else f"{m['speedup_over_product']:,.0f}",
                "error": f"{m['scan_error']:.0e}",
                "error (product)": "-" if m["product_error"] is None else f"{m['product_error']:.0e}",
                "kept": f"{m['scan_kept_bytes']}",
                "kept (product)": f"{m['product_kept_bytes'] / 2**20:,.0f} MiB"
                + "*" * (not m["product_kept_measured"]),
            }
            for m in measured
        ],
    )
    print("* 4 L² bytes, by formula: it would not fit or takes minutes")
    exchanged = [exchanged_bytes(length, size) for length in (20_480, 131_072) for size in CONTEXT_PARALLEL_SIZES]
    print_table(
        "Context parallel: bytes received per rank and sequence",
        [
            {
                "L": f"{e['length']}",
                "CP": f"{e['cp']}",
                "ours": f"{e['ours']}",
                "full-length gather": f"{e['gather']}",
                "ratio": f"1 : {math.floor(e['gather'] / e['ours'])}",
            }
            for e in exchanged
        ],
    )
    write_result("future_kl", {"half_life": HALF_LIFE, "forward": measured, "exchanged_bytes": exchanged})


if __name__ == "__main__":
    main()
