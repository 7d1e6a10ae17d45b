"""Layouts of tiny models on which the plan is compared with real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fipo_megatron.config import ActorConfig, Config, DataConfig, ParallelConfig, RewardConfig, RolloutConfig
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.weights.architecture import Architecture
from tests.distributed import layout_cases

TOKENS = 512
TP2, PP2, CP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}
SP, VPP2, EP2 = {"sequence_parallel": True}, {"virtual_pipeline": 2}, {"expert_parallel": 2}
PLAIN = {"distributed_optimizer": False}
BF16 = {"dtype": "bfloat16"}
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}

# World size -> name -> (parallel sizes, changes to the actor's settings, architecture).
CASES: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    1: {
        "one rank": ({}, PLAIN, "qwen2-tied-yarn"),
        "one rank, bf16, full recompute": ({}, BF16 | FULL, "qwen3"),
    },
    2: {
        "TP2": (TP2, PLAIN, "qwen2"),
        "TP2+SP, bf16, selective recompute": (TP2 | SP, BF16 | SELECTIVE, "qwen3"),
        "PP2": (PP2, {}, "qwen2-tied-yarn"),
        "PP2, VPP2, bf16": (PP2 | VPP2, BF16, "qwen2"),
        "CP2, bf16": (CP2, BF16, "llama3"),
        "DP2": ({}, {}, "qwen3"),
        "DP2, bf16, full recompute": ({}, BF16 | FULL, "qwen2"),
        "EP2": (EP2, {}, "qwen3-moe"),
    },
    4: {
        "TP2+SP CP2, bf16, selective recompute": (TP2 | SP | CP2, BF16 | SELECTIVE, "qwen3"),
        "TP2+SP PP2, full recompute": (TP2 | SP | PP2, FULL, "qwen2-tied-yarn"),
        "TP2+SP EP2 ETP2, bf16": (TP2 | SP | EP2 | {"expert_tensor_parallel": 2}, BF16, "qwen3-moe"),
    },
}


def micro_batches(sizes: dict[str, Any]) -> int:
    """Returns the number of micro-batches of a case: enough to fill the pipeline."""
    return sizes.get("pipeline_parallel", 1) * sizes.get("virtual_pipeline", 1)


def configuration(sizes: dict[str, Any], changes: dict[str, Any], name: str) -> tuple[Config, Architecture]:
    """Returns the configuration and the architecture of a case."""
    settings = {"dtype": "float32", "token_budget": TOKENS, "vocab_multiple": 8, "log_prob_chunk_tokens": 128}
    actor = ActorConfig(parallel=ParallelConfig(**sizes), **(settings | changes))
    family, values = layout_cases.ARCHITECTURES[name]
    values = layout_cases._SMALL | values | {"architectures": [f"{family}ForCausalLM"]}
    data, rollout = DataConfig(max_prompt_tokens=8), RolloutConfig(max_response_tokens=TOKENS - 8)
    reward = RewardConfig(overlong_buffer_tokens=0)
    return Config(actor=actor, data=data, rollout=rollout, reward=reward), Architecture.from_hf(values)


def real_mini_batch(sizes: dict[str, Any], data_parallel_size: int) -> tuple[MiniBatch, list[Trajectory]]:
    """Returns micro-batches that each hold one sequence of random tokens, as long as the budget."""
    rng = np.random.default_rng(1)
    trajectories = [
        Trajectory(
            Prompt(str(number), rng.integers(0, layout_cases.VOCAB, 8).astype(np.int32), ""),
            0,
            rng.integers(0, layout_cases.VOCAB, TOKENS - 8).astype(np.int32),
            np.full(TOKENS - 8, -5.0, np.float32),
            np.ones(TOKENS - 8, np.bool_),
            advantage=1.0,
        )
        for number in range(micro_batches(sizes))
    ]
    members = tuple((number,) for number in range(len(trajectories)))
    return MiniBatch((members,) * data_parallel_size), trajectories
