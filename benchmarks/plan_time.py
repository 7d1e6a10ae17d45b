"""The plan's time of steps and training passes beside figures that others have published.

Every case is a public run whose model, layout, batch and lengths are known. "Step" compares the whole step, "training"
the tokens per second and GPU of forward, backward and optimizer. docs/planning.md names the sources and explains the
differences.

    python -m benchmarks.plan_time
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.result_table import print_table
from fipo_megatron.config import ActorConfig, Config, ParallelConfig, RewardConfig, RolloutConfig
from fipo_megatron.config.actor_sections import AlgorithmConfig
from fipo_megatron.config.rollout_sections import DataConfig, ServersConfig
from fipo_megatron.observe.devices import device
from fipo_megatron.plan.efficiencies import TABLE, Efficiency, Rates
from fipo_megatron.plan.response_lengths import ResponseLengths
from fipo_megatron.plan.step_estimate import ClusterShape, StepTime, Workload, estimate_step
from fipo_megatron.plan.training_time import ActorTime, pack_sample, packing_key
from fipo_megatron.weights.architecture import Architecture

CONFIGS = Path(__file__).parents[1] / "tests" / "weights" / "configs"
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262_144,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
_SMALL: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
    "Qwen3-4B": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
}
BRIDGE = "Megatron-Bridge"
NEMO, PRIME, VERL = "NeMo RL 0.5", "prime-rl", "veRL"

# Weights reach colocated engines as handles of device memory in these systems; this project writes files.
BY_HANDLE: Mapping[str, Efficiency] = {
    **TABLE,
    "sync_disk": replace(TABLE["sync_disk"], value=2 * TABLE["sync_distributed"].value),
}


def architecture(name: str) -> Architecture:
    """Returns the architecture of a model."""
    if name in _SMALL:
        return Architecture.from_hf(_QWEN3 | _SMALL[name])
    return Architecture.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))


@dataclass(frozen=True)
class Pass:
    """A published rate of training.

    Attributes:
        source: Who published it.
        model: Model.
        gpus: Number of GPUs.
        tokens: Tokens of each sequence.
        sequences: Sequences of a mini-batch.
        published: Tokens per second and GPU.
        device: Name of the GPU.
        settings: Settings of the actor.
    """

    source: str
    model: str
    gpus: int
    tokens: int
    sequences: int
    published: float
    device: str = "h100"
    settings: dict[str, Any] = field(default_factory=dict)

    def estimate(self) -> float:
        """Returns the plan's tokens per second and GPU."""
        actor = ActorConfig(token_budget=self.tokens, **self.settings)
        parallel = actor.parallel
        data = self.gpus // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)
        lengths = ResponseLengths(median=self.tokens - 1, spread=0, limit=self.tokens, prompt=1)
        packing = pack_sample(packing_key(actor, architecture(self.model), lengths, self.sequences, data))
        timed = ActorTime(architecture(self.model), actor, device(self.device), 8, data, Rates())
        seconds = sum(timed.mini_batch(timed.training(packing))) + sum(timed.optimizer_step())
        return packing.real_tokens / seconds / self.gpus


_FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "overlap_grad_reduce": True}
PASSES = (
    Pass(
        BRIDGE,
        "Llama-3.1-70B",
        64,
        8192,
        256,
        1664,
        settings=_FP8
        | {
            "parallel": ParallelConfig(
                tensor_parallel=4, pipeline_parallel=8, virtual_pipeline=5, sequence_parallel=True
            )
        },
    ),
    Pass(
        BRIDGE,
        "Qwen3-30B-A3B",
        16,
        4096,
        1024,
        9058,
        settings=_FP8 | {"parallel": ParallelConfig(expert_parallel=8, pipeline_parallel=2, virtual_pipeline=12)},
    ),
    Pass(PRIME, "Qwen3-0.6B", 1, 65_536, 1, 10_147, settings={"recompute": "full"}),
    Pass(PRIME, "Qwen3-4B", 8, 65_536, 8, 28_970 / 8, settings={"recompute": "full"}),
    Pass(PRIME, "Qwen3-4B", 8, 65_536, 8, 29_540 / 8, "h200", settings={"recompute": "full"}),
    Pass(PRIME, "Qwen3-0.6B", 1, 16_384, 1, 11_896, settings={"recompute": "full"}),
)


@dataclass(frozen=True)
class Step:
    """A published step.

    Attributes:
        source: Who published it.
        model: Model.
        shape: GPUs of trainer and servers.
        mean: Mean response length in tokens.
        prompt: Mean prompt length in tokens.
        published: Seconds of the step.
        actor: Settings of the actor.
        rollout: Settings of the rollout.
        servers: Settings of the servers.
        device: Name of the GPU.
        kl_coef: Coefficient of the KL term; above 0, the reference policy's log-probs are computed, too.
    """

    source: str
    model: str
    shape: ClusterShape
    mean: float
    prompt: float
    published: float
    actor: dict[str, Any]
    rollout: dict[str, Any]
    servers: dict[str, Any] = field(default_factory=dict)
    device: str = "h100"
    kl_coef: float = 0.01

    @property
    def way(self) -> str:
        """Whether trainer and servers take turns or overlap."""
        return "overlap" if self.rollout.get("overlap") else "colocated"

    def estimate(self) -> StepTime:
        """Returns the plan's step."""
        limit = self.rollout["max_response_tokens"]
        config = Config(
            algorithm=AlgorithmConfig(kind="grpo", kl_coef=self.kl_coef, dynamic_sampling=False),
            data=DataConfig(max_prompt_tokens=256),
            actor=ActorConfig(**self.actor),
            rollout=RolloutConfig(servers=ServersConfig(**self.servers), **self.rollout),
            reward=RewardConfig(overlong_buffer_tokens=0),
        )
        lengths = ResponseLengths.from_mean(self.mean, limit, prompt=self.prompt)
        found = estimate_step(
            config,
            architecture(self.model),
            self.shape,
            device(self.device),
            workload=Workload(lengths),
            table=BY_HANDLE,
        )
        return _with_every_log_prob(found, config)


def _with_every_log_prob(found: StepTime, config: Config) -> StepTime:
    """Adds the log-prob pass over the first mini-batch, which other systems run. Needs several updates or a KL term."""
    updates = config.groups_per_step / config.actor.prompts_per_mini_batch
    policies = 1 + (config.algorithm.kl_coef != 0)
    factor = policies * updates / (policies * updates - 1)
    phases = {phase.name: phase for phase in found.phases}
    pieces = [
        piece if piece.name == "reference swap" else replace(piece, seconds=factor * piece.seconds)
        for piece in phases["log_probs"].pieces
    ]
    longer = replace(phases["log_probs"], pieces=tuple(pieces))
    training = found.phase("log_probs") + found.phase("update")
    added = longer.seconds - found.phase("log_probs")
    if config.rollout.overlap:
        sampling = found.phase("generate")
        added = max(sampling, training + added) - max(sampling, training)
    step = found.step_seconds * (1 + added / (found.step_seconds - found.phase("other")))
    return replace(found, phases=tuple((phases | {"log_probs": longer}).values()), step_seconds=step)


def _nemo(model: str, gpus: int, mean: float, prompt: float, published: float, *, overlap: bool, **rest: Any) -> Step:
    """Returns a case of NeMo RL: 64 prompts with 32 responses, 4 updates, packs of 4,096 tokens."""
    tensor = rest.pop("servers")
    parallel = ParallelConfig(**rest.pop("parallel", {}))
    return Step(
        NEMO,
        model,
        ClusterShape(gpus // 2, gpus // 2) if overlap else ClusterShape(gpus, gpus),
        mean,
        prompt,
        published,
        {"prompts_per_mini_batch": 16, "token_budget": 4096, "parallel": parallel} | rest,
        {
            "prompts_per_step": 64,
            "samples_per_prompt": 32,
            "max_response_tokens": 3840,
            "overlap": overlap,
            "max_staleness": int(overlap),
            "sglang": {"tp_size": tensor, "mem_fraction_static": 0.8 if overlap else 0.6},
        },
        {"sync": "distributed"} if overlap else {"colocated": True, "sync": "disk"},
    )


_8B = {"pipeline_parallel": 2}
_32B = {"tensor_parallel": 4, "pipeline_parallel": 4, "sequence_parallel": True}
STEPS = (
    _nemo(
        "Llama-3.1-8B",
        16,
        1019,
        127,
        92.8,
        overlap=False,
        servers=1,
        parallel={"pipeline_parallel": 2},
        recompute="full",
    ),
    _nemo("Llama-3.1-8B", 16, 1123, 127, 64.8, overlap=True, servers=1, recompute="full"),
    _nemo("Qwen3-32B", 32, 3251, 104, 376, overlap=False, servers=4, parallel=_32B),
    _nemo("Qwen3-32B", 64, 3252, 104, 200, overlap=True, servers=4, parallel=_32B),
    _nemo("Qwen3-30B-A3B", 32, 3196, 104, 198, overlap=False, servers=2, parallel={"expert_parallel": 8}),
    _nemo(
        "Qwen3-30B-A3B",
        32,
        3201,
        104,
        154,
        overlap=True,
        servers=2,
        parallel={"expert_parallel": 8, "pipeline_parallel": 2},
    ),
)

VERL_PHASES = {"generate": 162.0, "log_probs": 119.0, "update": 344.0}
"""Seconds of the phases of veRL's colocated run of Qwen2.5-Math-7B on 16 H20 with Megatron; the step takes 699. Its
"gen" is 207: ``generate_sequences`` and the hand-over of the GPUs."""


def verl_step(mean: float) -> StepTime:
    """Returns the plan of veRL's run for a mean response length, which was not published."""
    return Step(
        VERL,
        "Qwen2.5-7B",
        ClusterShape(16, 16),
        mean,
        170,
        699,
        {
            "prompts_per_mini_batch": 32,
            "token_budget": 20_480,
            "parallel": ParallelConfig(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
        },
        {
            "prompts_per_step": 512,
            "samples_per_prompt": 16,
            "max_response_tokens": 8192,
            "sglang": {"tp_size": 2, "mem_fraction_static": 0.8},
        },
        {"colocated": True, "sync": "disk"},
        device="h20",
        kl_coef=0,
    ).estimate()


def verl_mean() -> float:
    """Returns the mean response length for which the plan's update takes as long as veRL's."""
    low, high = 100.0, 6000.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if verl_step(middle).phase("update") < VERL_PHASES["update"] else (low, middle)
    return low


def main() -> int:
    """Prints the tables."""
    rows = []
    for step in STEPS:
        found = step.estimate()
        rows.append(
            {
                "source": step.source,
                "model": step.model,
                "GPUs": str(found.gpus),
                "": step.way,
                "published s": f"{step.published:g}",
                "plan s": f"{found.step_seconds:.0f}",
                "difference": f"{found.step_seconds / step.published - 1:+.0%}",
                "sampling / log-probs / update s": " / ".join(
                    f"{found.phase(name):.0f}" for name in ("generate", "log_probs", "update")
                ),
            }
        )
    print_table("Steps", rows)
    mean = verl_mean()
    found = verl_step(mean)
    rows = [
        {
            "phase": name,
            "published s": f"{seconds:g}",
            "plan s": f"{found.phase(name):.0f}",
            "published share": f"{seconds / 699:.0%}",
            "plan share": f"{found.phase(name) / found.step_seconds:.0%}",
        }
        for name, seconds in VERL_PHASES.items()
    ]
    print_table(f"veRL, 16 H20, Qwen2.5-Math-7B, at {mean:,.0f} tokens per response (fitted to the update)", rows)
    rows = [
        {
            "source": one.source,
            "model": one.model,
            "GPUs": f"{one.gpus} {one.device}",
            "sequence": f"{one.tokens:,}",
            "published tokens/s/GPU": f"{one.published:,.0f}",
            "plan": f"{one.estimate():,.0f}",
            "difference": f"{one.estimate() / one.published - 1:+.0%}",
        }
        for one in PASSES
    ]
    print_table("Training", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
