"""The measurements of benchmarks.actor, in their own processes; rank 0 writes the result as JSON.

python -m benchmarks.actor_worker OUT.json memory PATH TOKENS COLUMNS
torchrun --nproc-per-node 2 -m benchmarks.actor_worker OUT.json context TOKENS COLUMNS
torchrun --nproc-per-node N -m benchmarks.actor_worker OUT.json layouts
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.actor import LAYOUT_BUDGET, LAYOUT_COLUMNS, LAYOUT_TOKENS, LAYOUTS, UPDATES, WARM_UP_TOKENS
from benchmarks.log_probs import WIDTH, resident_bytes
from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import LocalMicroBatch
from fipo_megatron.config import ActorConfig, Config, ParallelConfig
from fipo_megatron.data.packing import MiniBatch, plan_micro_batches
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.weights.architecture import Architecture

PROMPT_TOKENS = 16


def architecture(columns: int, layers: int, mixture: bool = False) -> Architecture:
    """Returns a small Qwen3; as a mixture, 2 of 4 experts of half the dense width per token, for equal work."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if mixture else "Qwen3ForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": columns,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * WIDTH // 2}
    return Architecture.from_hf(config | (experts | {"norm_topk_prob": True} if mixture else {}))


def trajectory(number: int, tokens: int, columns: int) -> Trajectory:
    """Returns a trajectory of random tokens, of which the first are the prompt."""
    rng = np.random.default_rng(number)
    ids, response = rng.integers(0, columns, tokens).astype(np.int32), tokens - PROMPT_TOKENS
    log_probs = np.full(response, -np.log(columns), np.float32)
    prompt = Prompt(f"p{number}", ids[:PROMPT_TOKENS], "")
    mask = np.ones(response, np.bool_)
    return Trajectory(prompt, 0, ids[PROMPT_TOKENS:], log_probs, mask, advantage=(-1.0) ** number)


@dataclass
class Setup:
    """A random actor in its layout, with process groups initialised."""

    layout: parallel.RankLayout
    actor: MegatronActor
    columns: int

    @classmethod
    def build(
        cls,
        shape: Architecture,
        sizes: dict[str, Any],
        changes: dict[str, Any],
        layout: parallel.RankLayout | None = None,
    ) -> Setup:
        """Builds an actor from parallel sizes and changes to the default settings: float32, one process.

        Process groups are initialised unless ``layout`` is that of existing ones.
        """
        settings: dict[str, Any] = {
            "dtype": "float32",
            "distributed_optimizer": False,
            "parallel": ParallelConfig(**sizes),
        }
        config = Config(actor=ActorConfig(**(settings | changes)))
        layout = layout or parallel.initialize(config.actor.parallel, seed=3)
        return cls(layout, MegatronActor(config, shape, layout, load=lambda chunks: None), shape.vocab)

    def batch(self, lengths: Sequence[int], budget: int) -> tuple[list[Trajectory], tuple[MiniBatch, ...]]:
        """Returns trajectories of these lengths and their plan as one mini-batch."""
        trajectories = [trajectory(number, length, self.columns) for number, length in enumerate(lengths)]
        settings = self.actor.config.actor
        plan = plan_micro_batches(
            [self.layout.context.padded_length(length) for length in lengths],
            [range(len(lengths))],
            token_budget=budget,
            data_parallel_size=self.layout.data_size,
            micro_batch_multiple=settings.parallel.pipeline_parallel,
        )
        return trajectories, plan

    def warm_up(self) -> None:
        """Takes a small step, which loads libraries and creates the optimizer state."""
        trajectories, plan = self.batch([WARM_UP_TOKENS] * self.layout.data_size, WARM_UP_TOKENS)
        self.actor.update(plan, trajectories, self.actor.log_probs(plan, trajectories))


class Phases:
    """Peak and final resident memory of consecutive phases, as counted by the kernel."""

    def __init__(self) -> None:
        self.peak_bytes: dict[str, int] = {}
        self.level_bytes: dict[str, int] = {}
        self.end("start")

    def end(self, phase: str) -> None:
        """Ends the current phase and records its memory."""
        self.peak_bytes[phase], self.level_bytes[phase] = resident_bytes("VmHWM"), resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")


Head = Callable[[torch.Tensor, LocalMicroBatch, bool], TokenLogProbs]


def plain_head(actor: MegatronActor) -> Head:
    """Returns a head that computes log-probs and entropy from float32 logits of all tokens at once."""

    def head(hidden_SBH: torch.Tensor, micro: LocalMicroBatch, with_entropy: bool) -> TokenLogProbs:
        log_p_TV = torch.log_softmax(hidden_SBH[:, 0] @ actor.chunks[-1].output_weight().t(), dim=-1)
        entropy = -(log_p_TV.exp() * log_p_TV).sum(-1) if with_entropy else None
        return TokenLogProbs(log_p_TV.gather(1, micro.labels[0, :, None])[:, 0], entropy)

    return head


def watched(head: Head, phases: Phases) -> Head:
    """Wraps a head to end the phase ``decoder`` at its begin and ``head`` once it returned its input's gradient."""

    def watch(hidden_SBH: torch.Tensor, micro: LocalMicroBatch, with_entropy: bool) -> TokenLogProbs:
        phases.end("decoder")
        if hidden_SBH.requires_grad:
            # torch's stub of register_hook has no types.
            hidden_SBH.register_hook(lambda grad: phases.end("head"))  # type: ignore[no-untyped-call]
        found = head(hidden_SBH, micro, with_entropy)
        if not hidden_SBH.requires_grad:
            phases.end("head")
        return found

    return watch


def memory(path: str, tokens: str, columns: str) -> dict[str, Any]:
    """Measures log-prob pass and training step of one sequence, in bytes per phase above the level before."""
    setup = Setup.build(architecture(int(columns), layers=2), {}, {})
    setup.warm_up()
    trajectories, plan = setup.batch([int(tokens)], int(tokens))
    actor = setup.actor
    head = plain_head(actor) if path == "plain" else actor._token_log_probs
    result: dict[str, Any] = {}

    def measure(name: str, function: Callable[[], Any]) -> Any:
        phases, start = Phases(), time.perf_counter()
        with mock.patch.object(actor, "_token_log_probs", watched(head, phases)):
            found = function()
        seconds = time.perf_counter() - start
        phases.end("rest")
        before = phases.level_bytes["start"]
        result[name] = {
            "seconds": seconds,
            "peak_bytes": max(phases.peak_bytes[phase] for phase in ("decoder", "head", "rest")) - before,
            "decoder_peak_bytes": phases.peak_bytes["decoder"] - before,
            "decoder_kept_bytes": phases.level_bytes["decoder"] - before,
            "head_peak_bytes": phases.peak_bytes["head"] - phases.level_bytes["decoder"],
            "rest_peak_bytes": phases.peak_bytes["rest"] - before,
        }
        return found

    old = measure("log_probs", lambda: actor.log_probs(plan, trajectories))
    (metrics,) = measure("update", lambda: actor.update(plan, trajectories, old))
    assert not metrics.skipped, metrics
    return result


def context(tokens: str, columns: str) -> dict[str, Any]:
    """Measures the peak resident memory of each rank that trains on one sequence, everything included."""
    setup = Setup.build(architecture(int(columns), layers=2), {"context_parallel": dist_size()}, {})
    at_start = resident_bytes("VmRSS")
    trajectories, plan = setup.batch([int(tokens)], int(tokens))
    start = time.perf_counter()
    old = setup.actor.log_probs(plan, trajectories)
    between = time.perf_counter()
    (metrics,) = setup.actor.update(plan, trajectories, old)
    seconds = {"log_probs_s": between - start, "update_s": time.perf_counter() - between}
    assert not metrics.skipped, metrics
    mine = {"peak_bytes": resident_bytes("VmHWM"), "model_built_bytes": at_start, **seconds}
    ranks: list[Any] = [None] * dist_size()
    dist.all_gather_object(ranks, mine)
    return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "ranks": ranks}


def layouts() -> list[dict[str, Any]]:
    """Measures the seconds of an update of the same mini-batch in every layout of this world size."""
    results = []
    for name, (sizes, changes, mixture) in LAYOUTS[dist_size()].items():
        setup = Setup.build(architecture(LAYOUT_COLUMNS, layers=4, mixture=mixture), sizes, changes)
        trajectories, plan = setup.batch(LAYOUT_TOKENS, LAYOUT_BUDGET)
        old = setup.actor.log_probs(plan, trajectories)
        seconds = []
        for _ in range(1 + UPDATES):
            dist.barrier()
            start = time.perf_counter()
            setup.actor.update(plan, trajectories, old)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:])  # the first one warms up
        micro_batches = len(plan[0].micro_batches[0])
        case = {"layout": name, "model": "mixture" if mixture else "dense", "micro_batches": micro_batches}
        results.append({**case, "median_s": median, "seconds": seconds[1:]})
        parallel.destroy()
    return results


def dist_size() -> int:
    """Returns the number of ranks of the job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(out: str, what: str, *arguments: str) -> None:
    warnings.simplefilter("ignore")
    measurements: dict[str, Callable[..., Any]] = {"memory": memory, "context": context, "layouts": layouts}
    result = measurements[what](*arguments)
    parallel.destroy()
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
