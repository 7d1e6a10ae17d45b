"""The actor and the Future-KL scan on one GPU: time, model FLOP/s against the device's peak, peak memory.

Random Qwen2.5 models in bfloat16 with the distributed optimizer, one packed micro-batch of sequences of uneven lengths:
``MegatronActor.log_probs`` and ``update`` (forward, backward, optimizer step) by the wall clock with the device idle at
both ends, so that packing on the host counts. The layers of torch, and, where Transformer Engine is installed, its own
and FP8.

Model FLOPs count what the mathematics needs, not what is computed again: forward 2 · N · T for the N weights in matrix
products (the output layer among them, the embedding not) and T tokens, as in Kaplan et al. (arXiv 2001.08361, Sec.
2.1), plus per layer 4 · ℓ² · heads · head dimension for the scores and the weighted values of a sequence of ℓ tokens,
halved as attention is causal. Backward is twice forward: 6 · N · T and 12 · L · h · d · ℓ² / 2 in all, as in PaLM
(arXiv 2204.02311, App. B) but for the half. MFU is that over the time and the peak of dense bfloat16, also for FP8.

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
from benchmarks.report import print_table, write_result
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
"""Dense bfloat16 FLOP/s by the name of the device, from NVIDIA's data sheets (which for Hopper give twice that, "with
sparsity"). No MFU for a device that is not here."""

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
"""A micro-batch holds sequences of these parts of its tokens."""
REPEATS, SCAN_REPEATS = 5, 21
SCANS = ((8, 20_480), (1, 131_072))
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Shape:
    """A model and how many of its layers are built.

    Attributes:
        name: Of the model.
        built: Layers; fewer than the model has where all would not fit beside their optimizer state.
        config: As config.json has it.
    """

    name: str
    built: int
    config: dict[str, Any]

    def architecture(self) -> Architecture:
        """Of what is built."""
        return Architecture.from_hf(COMMON | self.config | {"num_hidden_layers": self.built})

    @property
    def title(self) -> str:
        """With the number of layers where it is not the model's."""
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
    """N: the weights that every token is multiplied with."""
    width = shape.heads * shape.head_dim
    attention = shape.hidden * (2 * width + 2 * shape.kv_groups * shape.head_dim)
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.hidden * shape.vocab


def forward_flops(shape: Architecture, lengths: Sequence[int]) -> float:
    """Model FLOPs of one forward pass over packed sequences; a training step is three times that."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * sum(length**2 for length in lengths) / 2
    return 2.0 * matrix_weights(shape) * sum(lengths) + attention


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median seconds, and the most memory ever allocated during one call."""
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
    """The log-prob pass and the training step of one micro-batch, with tokens and FLOPs per second."""
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
    """Every budget that memory and time allow; what could not be measured says why under ``left_out``."""
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
                # One kind of layers that fails should not cost the rest of a run on a lent machine.
                left_out = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        results.append(result | ({"left_out": left_out} if left_out else {}))
    del setup
    parallel.destroy()
    gc.collect()
    torch.cuda.empty_cache()
    return results


def measure_scan(batch: int, length: int) -> dict[str, float]:
    """Future-KL of packed sequences by the scan, and of the same rows by the paper's chunked product."""
    values = 0.1 * torch.randn(batch, length, device="cuda")
    packed, shards = values.flatten(), SequenceShards.build([length] * batch, device="cuda")

    def product() -> torch.Tensor:
        with torch.device("cuda"):  # it was written for the CPU
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
    """Of the peak of this device, if it is known."""
    peak = PEAK_BF16.get(torch.cuda.get_device_name())
    return flops_per_s / peak if peak else None


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each pass."""
    table = []
    for result in results:
        for name, found in result.get("passes", {"-": None}).items():
            share = mfu(found["flops_per_s"]) if found else None
            table.append(
                {
                    "model": result["model"],
                    "layers": result["layers"],
                    "tokens": f"{result['tokens']}",
                    "pass": name,
                    "ms": f"{1e3 * found['seconds']:.1f}" if found else result["left_out"],
                    "tokens/s": f"{found['tokens_per_s']:,.0f}" if found else "-",
                    "TFLOP/s": f"{found['flops_per_s'] / 1e12:.0f}" if found else "-",
                    "MFU": f"{share:.1%}" if share else "-",
                    "peak": f"{found['peak_bytes'] / 2**30:.1f} GiB" if found else "-",
                }
            )
    return table


def main(limit_seconds: str = str(LIMIT_SECONDS)) -> int:
    """Prints the tables and writes the result; exit code 2 without CUDA, 1 where something failed."""
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
    shares = {"peak_bf16_flops_per_s": PEAK_BF16.get(device), "parts": PARTS}
    shapes = [asdict(shape) for shape in SHAPES]
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    write_result(f"gpu_{slug}", shares | {"shapes": shapes, "future_kl": scans, "actor": results})
    return int(any(result.get("left_out", "").startswith("failed") for result in results))


def scan_row(scan: dict[str, float]) -> dict[str, str]:
    """Of the table."""
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
