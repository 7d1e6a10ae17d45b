"""The share of Future-KL in the passes over a micro-batch: measured on a CPU, computed for an H200.

    python -m benchmarks.future_kl_share

CPU: a tiny model in one process, CPU seconds of one thread. *Future-KL* is what a fused kernel could replace: the
shift, the filter, the scan, exp, clip and the safety rule. *Loss* is the whole loss with its statistics, forward and
backward. The passes are one log-prob pass and one training pass with its optimizer step.

H200: seconds of the scan and of the loss as benchmarks.gpu measured them, over the passes of a micro-batch by the plan
(:mod:`fipo_megatron.plan.training_time`) or, for Qwen3-0.6B, as measured; and over a whole step of two layouts by the
plan, sampling included.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.actor_worker import Setup, architecture
from benchmarks.balance import Case
from benchmarks.plan_time import architecture as real_architecture
from benchmarks.result_table import RESULTS, print_table, write_result
from fipo_megatron.actor import parallel
from fipo_megatron.algorithm.future_kl import SequenceShards, future_kl
from fipo_megatron.algorithm.policy_loss import LossInputs, future_kl_weight, log_prob_shift, policy_loss
from fipo_megatron.algorithm.policy_loss_config import loss_config
from fipo_megatron.config import load_config
from fipo_megatron.observe.devices import device
from fipo_megatron.plan.efficiencies import Rates
from fipo_megatron.plan.step_estimate import ClusterShape, estimate_step
from fipo_megatron.plan.training_time import ActorTime, Packing

CPU_LENGTHS = ((4096,), (4096,) * 4, (16_384,), (4096,) * 16)
COLUMNS, LAYERS = 2048, 2
GPU_CASES = (
    Case("Qwen2.5-32B", 32_768, 1024, {"tensor_parallel": 8, "sequence_parallel": True}),
    Case("Qwen2.5-7B", 24_576, 2048, {"tensor_parallel": 2, "sequence_parallel": True}),
    Case("Qwen2.5-32B", 131_072, 1024, {"tensor_parallel": 8, "context_parallel": 4, "sequence_parallel": True}),
)

GPU_STEPS = (("fipo_qwen2.5_32b_8_nodes", "Qwen2.5-32B", 64), ("fipo_qwen2.5_7b_math_1_node", "Qwen2.5-7B", 8))
LAYOUTS = Path(__file__).parents[1] / "examples" / "layouts"


def cpu_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Returns the median CPU seconds of a call, which other programs disturb less than the time on the clock."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(setup: Setup, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measures Future-KL, the loss and the passes on a CPU."""
    tokens, config = sum(lengths), loss_config("fipo")
    old = -torch.rand(tokens)
    new = (old + 0.05 * torch.randn(tokens)).requires_grad_()
    inputs = LossInputs(
        log_probs=new,
        old_log_probs=old,
        advantages=torch.randn(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        mask=torch.ones(tokens, dtype=torch.bool),
        shards=SequenceShards.build(list(lengths)),
        behaviour_log_probs=old,
    )

    def weights() -> None:
        with torch.no_grad():
            shift = log_prob_shift(new, old, inputs.mask, config.shift_clamp)
            filtered = torch.where(shift > math.log(config.dual_clip), 0.0, shift)
            raw = future_kl(filtered, config.half_life, inputs.shards).exp()
            future_kl_weight(raw, shift.exp(), inputs.advantages, config)

    def loss() -> None:
        new.grad = None
        policy_loss(inputs, config).numerator.backward()  # type: ignore[no-untyped-call]  # torch's own stub

    trajectories, plan = setup.batch(lengths, tokens)

    def passes() -> None:
        setup.actor.update(plan, trajectories, setup.actor.log_probs(plan, trajectories))

    weights()
    loss()
    found = {"future_kl_s": cpu_seconds(weights, 9), "loss_s": cpu_seconds(loss, 9)}
    return (
        {"lengths": lengths, "tokens": tokens} | found | {"passes_s": cpu_seconds(passes, 3 if tokens < 16_384 else 1)}
    )


def computed(case: Case) -> dict[str, Any]:
    """Returns the plan's seconds of the passes over a micro-batch that fills the budget with four sequences."""
    timed = ActorTime(real_architecture(case.model), case.actor, device("h200"), 8, 8, Rates())
    pairs = case.budget**2 / 8
    packing = Packing(np.array([[float(case.budget)]]), np.array([[pairs]]), case.budget, pairs)
    seconds = sum(float(each.total.sum()) for each in (timed.forward(packing), timed.training(packing)))
    return {"model": case.model, "parallel": case.parallel, "tokens": case.budget, "passes_s": seconds, "basis": "plan"}


def whole_step(layout: str, model: str, gpus: int) -> dict[str, Any]:
    """Returns the plan's seconds of a step whose trainer and servers take turns, and its micro-batches per rank."""
    config = load_config(LAYOUTS / f"{layout}.yaml")
    found = estimate_step(config, real_architecture(model), ClusterShape(gpus, gpus), device("h200"))
    count = round(found.figures["micro_batches"]) * config.updates_per_step
    tokens = config.actor.token_budget
    step = {"model": model, "parallel": {}, "tokens": tokens, "passes_s": found.step_seconds, "micro_batches": count}
    return step | {"basis": f"plan, whole step of {count} micro-batches"}


def gpu_cases() -> list[dict[str, Any]]:
    """Returns the shares on an H200: the scan and the loss as measured, over measured and computed passes."""
    measured = json.loads((RESULTS / "gpu_nvidia_h200_te.json").read_text())
    scan = max(each["scan_s"] for each in measured["future_kl"])
    loss = max(each["seconds"] for each in measured["loss"] if each["kind"] == "fipo")
    found = [
        {"model": row["model"], "parallel": {}, "tokens": int(row["tokens"].replace(",", ""))}
        | {"passes_s": row["passes"]["RL step"]["seconds"], "basis": "measured"}
        for row in measured["actor"]
        if "passes" in row and row["model"] == "Qwen3-0.6B" and "packed" not in row["tokens"] and row["layers"] == "TE"
    ]
    found += [*map(computed, GPU_CASES), *(whole_step(*case) for case in GPU_STEPS)]
    return [
        case
        | {name: seconds * case.get("micro_batches", 1) for name, seconds in (("future_kl_s", scan), ("loss_s", loss))}
        for case in found
    ]


def main() -> None:
    """Measures on the CPU, computes for the GPU, prints both tables and writes the result."""
    torch.set_num_threads(1)
    on_gpu = gpu_cases()
    setup = Setup.build(architecture(COLUMNS, LAYERS), {}, {"token_budget": max(map(sum, CPU_LENGTHS))})
    setup.warm_up()
    on_cpu = [measure(setup, lengths) for lengths in CPU_LENGTHS]
    parallel.destroy()
    sizes = {"hidden_size": 128, "layers": LAYERS, "vocab": COLUMNS}
    print_table(f"CPU, tiny model {sizes}", [_row(f"{len(m['lengths'])} x {m['lengths'][0]:,}", m) for m in on_cpu])
    print_table("H200, per micro-batch", [_row(_title(m), m) for m in on_gpu])
    write_result("future_kl_share", {"cpu_model": sizes, "cpu": on_cpu, "h200": on_gpu})


def _title(case: dict[str, Any]) -> str:
    sizes = "".join(f" {name[0].upper()}P{size}" for name, size in case["parallel"].items() if size is not True)
    return f"{case['model']}{sizes} {case['tokens']:,} ({case['basis']})"


def _row(title: str, measured: dict[str, Any]) -> dict[str, str]:
    row = {"": title, "passes, s": f"{measured['passes_s']:.3f}"}
    for name in ("future_kl", "loss"):
        seconds = measured[f"{name}_s"]
        row[f"{name}, ms"], row[f"{name}, share"] = f"{1e3 * seconds:.2f}", f"{seconds / measured['passes_s']:.3%}"
    return row


if __name__ == "__main__":
    main()
