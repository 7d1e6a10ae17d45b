"""The actor and the Future-KL scan on one GPU: time, model FLOP/s against the device's peak, peak memory.

Random models in bfloat16 with the distributed optimizer, one micro-batch of one long sequence or of packed sequences of
uneven lengths. ``MegatronActor.log_probs`` and ``update`` (forward, backward, optimizer step) are timed by the wall
clock with the device idle at both ends, so packing on the host is included. An RL step is one of each. The layers are
torch's and, if Transformer Engine is installed, its own, also in FP8. The loss and the output layer are timed alone,
too: the output layer in the shape of Qwen2.5-32B under 8-way tensor parallelism, where its floor is four matrix
products.

Model FLOPs (``observe/throughput.py``) exclude recomputation. Backward is twice forward. MFU divides them by the time
and by the peak of dense bfloat16 (``observe/devices.py``), also for FP8.

    python -m benchmarks.gpu [--limit SECONDS] [--layers KIND] [--results DIRECTORY]
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.actor_worker import Setup
from benchmarks.future_kl import HALF_LIFE, chunked_product
from benchmarks.result_table import RESULTS, print_table, write_result
from fipo_megatron.actor import parallel
from fipo_megatron.actor.log_probs import token_log_probs
from fipo_megatron.actor.megatron_config import transformer_engine_found
from fipo_megatron.algorithm.future_kl import SequenceShards, future_kl
from fipo_megatron.algorithm.policy_loss import LossInputs, policy_loss
from fipo_megatron.algorithm.policy_loss_config import loss_config
from fipo_megatron.config import ParallelConfig
from fipo_megatron.observe.devices import peak_flops
from fipo_megatron.observe.throughput import matrix_parameters, model_flops
from fipo_megatron.weights.architecture import Architecture

LOCAL, FUSED = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
LAYERS: dict[str, dict[str, Any]] = {"torch": {"transformer": LOCAL}}
WITH_TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "TE": {"transformer": FUSED},
    "TE, FP8 blockwise": {"transformer": FUSED, "fp8": "e4m3", "fp8_recipe": "blockwise"},
    "TE, FP8 tensorwise": {"transformer": FUSED, "fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "TE, FP8 delayed": {"transformer": FUSED, "fp8": "hybrid", "fp8_recipe": "delayed"},
}
PARTS = (2, 4, 8, 16, 16)
"""Divisors of a micro-batch's tokens: the lengths of its packed sequences."""
REPEATS, SCAN_REPEATS = 5, 21
MEASURE_SECONDS = 3.0
SCANS = ((8, 20_480), (1, 131_072))
LOSS_TOKENS = (16_384, 65_536)
HEAD = (32_768, 5_120, 19_008)
"""Tokens, hidden size and columns per rank of the output layer of Qwen2.5-32B under 8-way tensor parallelism."""
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


COMMON = {"max_position_embeddings": 131_072, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN3_06B = Shape(
    "Qwen3-0.6B",
    28,
    {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
)
QWEN25_7B = Shape(
    "Qwen2.5-7B",
    4,
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
)


@dataclass(frozen=True)
class Case:
    """A micro-batch of a model.

    Attributes:
        shape: The model.
        tokens: Tokens of the micro-batch.
        packed: Whether the tokens are five sequences of uneven lengths, and not one.
        layers: Kind of layers, a key of ``LAYERS`` or ``WITH_TRANSFORMER_ENGINE``.
        changes: Further settings of the actor.
    """

    shape: Shape
    tokens: int
    packed: bool
    layers: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.tokens // part for part in PARTS] if self.packed else [self.tokens]

    def row(self) -> dict[str, str]:
        """Returns the columns that name the case."""
        recompute = self.changes.get("recompute", "none")
        return {
            "model": self.shape.title,
            "layers": self.layers,
            "tokens": f"{self.tokens:,}{' packed' if self.packed else ''}",
            "recompute": recompute,
        }


SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}
CASES = (
    *(
        case
        for layers in ("torch", "TE")
        for case in (
            Case(QWEN3_06B, 16_384, False, layers),
            Case(QWEN3_06B, 16_384, True, layers),
            Case(QWEN3_06B, 65_536, False, layers, FULL),
            Case(QWEN25_7B, 32_768, True, layers, FULL),
        )
    ),
    *(Case(QWEN25_7B, 32_768, True, layers, FULL) for layers in list(WITH_TRANSFORMER_ENGINE)[1:]),
    Case(QWEN3_06B, 65_536, False, "TE", SELECTIVE),
    *(Case(QWEN3_06B, 16_384, True, layers) for layers in list(WITH_TRANSFORMER_ENGINE)[1:]),
)


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Measures the median seconds of a few calls, at most ``MEASURE_SECONDS`` in all, and their peak memory."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if sum(times) > MEASURE_SECONDS:
            break
    return {"seconds": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated()}


def passes(setup: Setup, case: Case) -> dict[str, dict[str, float]]:
    """Measures log-prob pass and training step of one micro-batch, with tokens and FLOPs per second."""
    trajectories, plan = setup.batch(case.lengths, case.tokens)
    old = setup.actor.log_probs(plan, trajectories)

    def update() -> None:
        (metrics,) = setup.actor.update(plan, trajectories, old)
        if metrics.skipped:
            raise RuntimeError(f"no step was taken: {metrics.skipped}")

    found = {
        "log-probs": measure(lambda: setup.actor.log_probs(plan, trajectories), REPEATS),
        "training step": measure(update, REPEATS),
    }
    found["RL step"] = {
        "seconds": sum(part["seconds"] for part in found.values()),
        "peak_bytes": max(part["peak_bytes"] for part in found.values()),
    }
    forward = model_flops(case.shape.architecture(), case.lengths)
    for name, factor in (("log-probs", 1), ("training step", 3), ("RL step", 4)):
        seconds, flops = found[name]["seconds"], factor * forward
        found[name] |= {"flops": flops, "flops_per_s": flops / seconds, "tokens_per_s": case.tokens / seconds}
    return found


def measure_case(case: Case, layout: parallel.RankLayout, deadline: float) -> dict[str, Any]:
    """Measures a case; if memory or time do not suffice, the reason stands under ``left_out``."""
    result: dict[str, Any] = case.row() | {"weights_in_products": matrix_parameters(case.shape.architecture())}
    if case.layers not in LAYERS and not transformer_engine_found():
        return result | {"left_out": "no Transformer Engine"}
    if time.perf_counter() > deadline:
        return result | {"left_out": "no time left"}
    layers = (LAYERS | WITH_TRANSFORMER_ENGINE)[case.layers]
    setup = None
    try:
        settings = {"dtype": "bfloat16", "distributed_optimizer": True} | layers | case.changes
        setup = Setup.build(case.shape.architecture(), {}, settings, layout)
        result["passes"] = passes(setup, case)
    except torch.OutOfMemoryError:
        result["left_out"] = "out of memory"
    except (RuntimeError, ValueError, AssertionError) as error:
        # A failure with one kind of layers must not end the rest of the run.
        result["left_out"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    del setup
    gc.collect()
    torch.cuda.empty_cache()
    return result


def measure_loss(kind: Literal["fipo", "dapo"], tokens: int) -> dict[str, Any]:
    """Measures forward and backward of the token loss of packed sequences."""
    lengths = [tokens // part for part in PARTS]
    sizes = torch.tensor(lengths, device="cuda")
    old = -torch.rand(sum(lengths), device="cuda")
    new = (old + 0.05 * torch.randn_like(old)).requires_grad_()
    inputs = LossInputs(
        log_probs=new,
        old_log_probs=old,
        advantages=torch.randn(len(lengths), device="cuda").repeat_interleave(sizes),
        mask=torch.ones_like(old, dtype=torch.bool),
        shards=SequenceShards.build(lengths, device="cuda"),
        behaviour_log_probs=old,
    )
    config = loss_config(kind)

    def both_passes() -> None:
        new.grad = None
        policy_loss(inputs, config).numerator.backward()  # type: ignore[no-untyped-call]  # torch's own stub

    return {"kind": kind, "tokens": tokens} | measure(both_passes, SCAN_REPEATS)


def measure_head() -> dict[str, Any]:
    """Measures log-probs and their gradients at the output layer, with the floor of four matrix products."""
    tokens, hidden_size, columns = HEAD
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(columns, hidden_size, device="cuda") / hidden_size**0.5).bfloat16().requires_grad_()
    labels = torch.randint(columns, (tokens,), device="cuda")

    def forward() -> torch.Tensor:
        return token_log_probs(hidden, weight, labels, with_entropy=True).log_probs

    def both_passes() -> None:
        hidden.grad = weight.grad = None
        forward().sum().backward()  # type: ignore[no-untyped-call]  # torch's own stub

    with torch.no_grad():
        product = measure(lambda: hidden[:8192] @ weight.t(), SCAN_REPEATS)
        alone = measure(forward, REPEATS)
    before = torch.cuda.memory_allocated()
    both = measure(both_passes, REPEATS)
    flops = 2.0 * tokens * hidden_size * columns
    return {
        "shape": HEAD,
        "matrix_product_flops_per_s": flops / (tokens / 8192) / product["seconds"],
        "forward_s": alone["seconds"],
        "forward_backward_s": both["seconds"],
        "forward_backward_flops_per_s": 4 * flops / both["seconds"],
        "forward_backward_extra_bytes": both["peak_bytes"] - before,
        "all_logits_bytes": 4 * tokens * columns,
    }


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
    peak = peak_flops(torch.cuda.get_device_name())
    return flops_per_s / peak if peak else None


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns a row of the table for each pass."""
    table = []
    for result in results:
        names = {name: result[name] for name in ("model", "layers", "tokens", "recompute")}
        for name, found in result.get("passes", {"-": None}).items():
            fraction = mfu(found["flops_per_s"]) if found else None
            table.append(
                names
                | {
                    "pass": name,
                    "ms": f"{1e3 * found['seconds']:.1f}" if found else result["left_out"],
                    "tokens/s": f"{found['tokens_per_s']:,.0f}" if found else "-",
                    "TFLOP/s": f"{found['flops_per_s'] / 1e12:.0f}" if found else "-",
                    "MFU": f"{fraction:.1%}" if fraction else "-",
                    "peak": f"{found['peak_bytes'] / 2**30:.1f} GiB" if found else "-",
                }
            )
    return table


def main() -> int:
    """Prints the tables and writes the result; returns 2 without CUDA, 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which no case is begun")
    parser.add_argument("--layers", default="", help="only cases whose kind of layers begins so, for example TE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the result file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device was found", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    deadline = time.perf_counter() + arguments.limit
    device = torch.cuda.get_device_name()
    scans = [measure_scan(batch, length) for batch, length in SCANS]
    print_table(f"Future-KL on {device}, τ = {HALF_LIFE:g}: median ms", [scan_row(scan) for scan in scans])
    losses = [measure_loss("fipo", tokens) for tokens in LOSS_TOKENS]
    losses += [measure_loss("dapo", tokens) for tokens in LOSS_TOKENS]
    print_table(f"Loss, forward and backward, on {device}", [loss_row(loss) for loss in losses])
    head = measure_head()
    print_table(f"Log-probs and entropy at the output layer on {device}", [head_row(head)])
    gc.collect()
    torch.cuda.empty_cache()
    # Once for all cases: on a GPU the process groups take seconds.
    layout = parallel.initialize(ParallelConfig(), seed=3)
    results: list[dict[str, Any]] = []
    for case in (case for case in CASES if case.layers.startswith(arguments.layers)):
        results.append(measure_case(case, layout, deadline))
        print("measured " + ", ".join(case.row().values()), flush=True)
    parallel.destroy()
    print_table(f"One micro-batch on {device}", rows(results))
    if peak_flops(device) is None:
        print(f"no MFU: the peak of {device} is not in fipo_megatron/observe/devices.py")
    result = {
        "peak_bf16_flops_per_s": peak_flops(device),
        "parts": PARTS,
        "shapes": [asdict(shape) for shape in (QWEN3_06B, QWEN25_7B)],
        "future_kl": scans,
        "loss": losses,
        "head": head,
        "actor": results,
    }
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    kind = f"_{arguments.layers.lower()}" if arguments.layers else ""
    write_result(f"gpu_{slug}{kind}", result, arguments.results)
    return int(any(result.get("left_out", "").startswith("failed") for result in results))


def loss_row(loss: dict[str, Any]) -> dict[str, str]:
    """Returns a row of the table."""
    return {
        "loss": loss["kind"],
        "tokens": f"{loss['tokens']:,}",
        "ms": f"{1e3 * loss['seconds']:.2f}",
        "peak": f"{loss['peak_bytes'] / 2**20:.0f} MiB",
    }


def head_row(head: dict[str, Any]) -> dict[str, str]:
    """Returns the row of the table."""
    return {
        "T x H x V": " x ".join(f"{size:,}" for size in head["shape"]),
        "forward": f"{1e3 * head['forward_s']:.1f} ms",
        "forward + backward": f"{1e3 * head['forward_backward_s']:.1f} ms",
        "TFLOP/s": f"{head['forward_backward_flops_per_s'] / 1e12:.0f}",
        "one product": f"{head['matrix_product_flops_per_s'] / 1e12:.0f} TFLOP/s",
        "extra memory": f"{head['forward_backward_extra_bytes'] / 2**20:,.0f} MiB",
        "all logits": f"{head['all_logits_bytes'] / 2**20:,.0f} MiB",
    }


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
    sys.exit(main())
