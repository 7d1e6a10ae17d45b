"""The actor and the Future-KL scan on one GPU: time, model FLOP/s against the device's peak, peak memory.

Random Qwen2.5 models in bfloat16 with the distributed optimizer, one packed micro-batch of sequences of uneven lengths.
``MegatronActor.log_probs`` and ``update`` (forward, backward, optimizer step) are timed by the wall clock with the
device idle at both ends, so packing on the host is included. The layers are torch's and, if Transformer Engine is
installed, its own, also in FP8.

Model FLOPs exclude recomputation. Forward takes 2 · N · T for the N weights in matrix products (with the output layer,
without the embedding) and T tokens, as in Kaplan et al. (arXiv 2001.08361, Sec. 2.1), plus per layer 4 · ℓ² · heads ·
head dimension for the scores and weighted values of a sequence of ℓ tokens, halved since attention is causal. Backward
is twice forward: 6 · N · T and 12 · L · h · d · ℓ² / 2 in all, as in PaLM (arXiv 2204.02311, App. B) except for the
half. MFU divides these by the time and by the peak of dense bfloat16, also for FP8.

    python -m benchmarks.gpu [LIMIT_SECONDS]
"""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.actor_worker import Setup
from benchmarks.future_kl import HALF_LIFE, chunked_product
from benchmarks.result_table import print_table, write_result
from fipo_megatron.actor import parallel
from fipo_megatron.actor.megatron_config import transformer_engine_found
from fipo_megatron.algorithm.future_kl import SequenceShards, future_kl
from fipo_megatron.weights.architecture import Architecture

PEAK_BF16 = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
"""Dense bfloat16 FLOP/s by the name of the device, from NVIDIA's data sheets (which for Hopper list twice that, "with
sparsity"). Other devices get no MFU."""

LOCAL, FUSED = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
LAYERS: dict[str, dict[str, Any]] = {"torch": {"transformer": LOCAL}}
WITH_TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "TE": {"transformer": FUSED},
    "TE, FP8 blockwise": {"transformer": FUSED, "fp8": "e4m3", "fp8_recipe": "blockwise"},
    "TE, FP8 tensorwise": {"transformer": FUSED, "fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "TE, FP8 delayed": {"transformer": FUSED, "fp8": "hybrid", "fp8_recipe": "delayed"},
}
BUDGETS = (16_384, 32_768)
PARTS = (2, 4, 8, 16, 16)
"""Divisors of a micro-batch's tokens: the lengths of its sequences."""
REPEATS, SCAN_REPEATS = 5, 21
SCANS = ((8, 20_480), (1, 131_072))
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Shape:
    """A model, possibly with fewer layers.

    Attributes:
        name: Name of the model.
        built: Number of layers built; fewer than the model has if all would not fit with their optimizer state.
        config: Contents of config.json.
    """

    name: str
    built: int
    config: dict[str, Any]

    def architecture(self) -> Architecture:
        """Returns the architecture with the layers that are built."""
        return Architecture.from_hf(COMMON | self.config | {"num_hidden_layers": self.built})

    @property
    def title(self) -> str:
        """Name of the model, with the number of layers if it is reduced."""
        layers = self.config["num_hidden_layers"]
        return self.name if self.built == layers else f"{self.name}, {self.built} of {layers} layers"


COMMON = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32_768, "rope_theta": 1e6}
SHAPES = (
    Shape(
        "Qwen2.5-0.5B",
        24,
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151_936,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        "Qwen2.5-7B",
        4,
        {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    ),
)


def matrix_weights(shape: Architecture) -> int:
    """Returns N, the number of weights that every token is multiplied with."""
    width = shape.heads * shape.head_dim
    attention = shape.hidden * (2 * width + 2 * shape.kv_groups * shape.head_dim)
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.hidden * shape.vocab


def forward_flops(shape: Architecture, lengths: Sequence[int]) -> float:
    """Returns the model FLOPs of one forward pass over packed sequences; a training step takes three times that."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * sum(length**2 for length in lengths) / 2
    return 2.0 * matrix_weights(shape) * sum(lengths) + attention


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Measures the median seconds and the peak memory allocated during one call."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated()}


def passes(setup: Setup, shape: Architecture, budget: int) -> dict[str, dict[str, float]]:
    """Measures log-prob pass and training step of one micro-batch, with tokens and FLOPs per second."""
    lengths = [budget // part for part in PARTS]
    trajectories, plan = setup.batch(lengths, budget)
    old = setup.actor.log_probs(plan, trajectories)

    def update() -> None:
        (metrics,) = setup.actor.update(plan, trajectories, old)
        if metrics.skipped:
            raise RuntimeError(f"no step was taken: {metrics.skipped}")

    found = {
        "log-probs": measure(lambda: setup.actor.log_probs(plan, trajectories), REPEATS),
        "training step": measure(update, REPEATS),
    }
    for name, factor in (("log-probs", 1), ("training step", 3)):
        seconds = found[name]["seconds"]
        flops = factor * forward_flops(shape, lengths)
        found[name] |= {"flops": flops, "flops_per_s": flops / seconds, "tokens_per_s": sum(lengths) / seconds}
    return found


def measure_model(shape: Shape, layers: str, changes: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """Measures every budget that memory and time allow; others have the reason under ``left_out``."""
    architecture, results = shape.architecture(), []
    common = {"model": shape.title, "layers": layers, "weights_in_products": matrix_weights(architecture)}
    setup, left_out = None, ""
    for budget in BUDGETS:
        result = common | {"tokens": budget}
        left_out = left_out or ("no time left" if time.perf_counter() > deadline else "")
        if not left_out:
            try:
                if setup is None:
                    settings = {"dtype": "bfloat16", "distributed_optimizer": True} | changes
                    setup = Setup.build(architecture, {}, settings)
                result["passes"] = passes(setup, architecture, budget)
            except torch.OutOfMemoryError:
                left_out = "out of memory"
            except (RuntimeError, ValueError, AssertionError) as error:
                # A failure with one kind of layers must not end the rest of the run.
                left_out = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        results.append(result | ({"left_out": left_out} if left_out else {}))
    del setup
    parallel.destroy()
    gc.collect()
    torch.cuda.empty_cache()
    return results


def measure_scan(batch: int, length: int) -> dict[str, float]:
    """Measures Future-KL of packed sequences by the scan, and of the same rows by the paper's chunked product."""
    values = 0.1 * torch.randn(batch, length, device="cuda")
    packed, shards = values.flatten(), SequenceShards.build([length] * batch, device="cuda")

    def product() -> torch.Tensor:
        with torch.device("cuda"):  # it creates tensors on the default device
            return chunked_product(values, HALF_LIFE)

    scan, plain = measure(lambda: future_kl(packed, HALF_LIFE, shards), SCAN_REPEATS), measure(product, 3)
    exact = future_kl(values.double(), HALF_LIFE)
    error = (future_kl(packed, HALF_LIFE, shards).view_as(exact) - exact).abs().max() / exact.abs().max()
    return {
        "batch": batch,
        "length": length,
        "scan_s": scan["seconds"],
        "product_s": plain["seconds"],
        "scan_peak_bytes": scan["peak_bytes"],
        "product_peak_bytes": plain["peak_bytes"],
        "scan_rounding": error.item(),
    }


def mfu(flops_per_s: float) -> float | None:
    """Returns the fraction of the device's peak; None if the peak is unknown."""
    peak = PEAK_BF16.get(torch.cuda.get_device_name())
    return flops_per_s / peak if peak else None


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns a row of the table for each pass."""
    table = []
    for result in results:
        for name, found in result.get("passes", {"-": None}).items():
            fraction = mfu(found["flops_per_s"]) if found else None
            table.append(
                {
                    "model": result["model"],
                    "layers": result["layers"],
                    "tokens": f"{result['tokens']}",
                    "pass": name,
                    "ms": f"{1e3 * found['seconds']:.1f}" if found else result["left_out"],
                    "tokens/s": f"{found['tokens_per_s']:,.0f}" if found else "-",
                    "TFLOP/s": f"{found['flops_per_s'] / 1e12:.0f}" if found else "-",
                    "MFU": f"{fraction:.1%}" if fraction else "-",
                    "peak": f"{found['peak_bytes'] / 2**30:.1f} GiB" if found else "-",
                }
            )
    return table


def main(limit_seconds: str = str(LIMIT_SECONDS)) -> int:
    """Prints the tables and writes the result; returns 2 without CUDA, 1 if a measurement failed."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device was found", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    deadline = time.perf_counter() + float(limit_seconds)
    scans = [measure_scan(batch, length) for batch, length in SCANS]
    kinds = LAYERS | (WITH_TRANSFORMER_ENGINE if transformer_engine_found() else {})
    results: list[dict[str, Any]] = []
    for layers, changes in kinds.items():
        for shape in SHAPES:
            results += measure_model(shape, layers, changes, deadline)
            print(f"measured {shape.title} with the layers of {layers}", flush=True)
    device = torch.cuda.get_device_name()
    print_table(f"Future-KL on {device}, τ = {HALF_LIFE:g}: median ms", [scan_row(scan) for scan in scans])
    print_table(f"One packed micro-batch on {device}", rows(results))
    if device not in PEAK_BF16:
        print(f"no MFU: the peak of {device} is not in PEAK_BF16")
    settings = {"peak_bf16_flops_per_s": PEAK_BF16.get(device), "parts": PARTS}
    shapes = [asdict(shape) for shape in SHAPES]
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    write_result(f"gpu_{slug}", settings | {"shapes": shapes, "future_kl": scans, "actor": results})
    return int(any(result.get("left_out", "").startswith("failed") for result in results))


def scan_row(scan: dict[str, float]) -> dict[str, str]:
    """Returns a row of the table."""
    return {
        "B x L": f"{scan['batch']:.0f} x {scan['length']:.0f}",
        "scan": f"{1e3 * scan['scan_s']:.2f}",
        "chunked product": f"{1e3 * scan['product_s']:.2f}",
        "x faster": f"{scan['product_s'] / scan['scan_s']:.0f}",
        "peak, scan": f"{scan['scan_peak_bytes'] / 2**20:.0f} MiB",
        "peak, product": f"{scan['product_peak_bytes'] / 2**20:.0f} MiB",
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
