"""Compares two models of different architectures under several layouts of the ranks of this job."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.compare.response_file import read_responses
from fipo_megatron.compare.teacher_forcing import ModelPair, Source
from fipo_megatron.config import ActorConfig, CompareConfig, Config, ParallelConfig, RolloutConfig
from fipo_megatron.weights.architecture import Architecture
from tests.actor.allocations import LargestAllocation

LAYOUTS = {
    1: {"one rank": {}},
    2: {
        "TP2": {"tensor_parallel": 2},
        "TP2, SP": {"tensor_parallel": 2, "sequence_parallel": True},
        "CP2": {"context_parallel": 2},
        "PP2": {"pipeline_parallel": 2},
        "DP2": {},
    },
}
BUDGET, CHUNK, TOP_K = 256, 16, 5


def main(directory: str) -> None:
    """Writes ``NAME.npz`` with the numbers of every response, for each layout of this number of ranks."""
    warnings.simplefilter("ignore")
    root = Path(directory)
    world_size = int(json.loads((root / "ranks.json").read_text()))
    for name, sizes in LAYOUTS[world_size].items():
        actor = ActorConfig(
            dtype="float32",
            token_budget=BUDGET,
            log_prob_chunk_tokens=CHUNK,
            prompts_per_mini_batch=1,
            parallel=ParallelConfig(**sizes),
        )
        config = replace(_config(), actor=actor)
        layout = parallel.initialize(config.actor.parallel, 0)
        base, rl = (Source(root / part, Architecture.from_directory(root / part)) for part in ("base", "rl"))
        responses = read_responses([str(root / "responses.jsonl")], None, base.architecture.vocab).trajectories
        pair = ModelPair(base, rl, config, layout)
        found = {}
        rounds = list(pair.rounds([len(one) for one in responses]))
        assert len(rounds) > 1
        for members in rounds:
            with LargestAllocation() as seen:
                found |= pair.compare(responses, members)
            tokens = sum(len(responses[i].tokens) for i in members) // (layout.data_size * layout.context.size)
            if layout.pipeline_rank == layout.pipeline_size - 1 and tokens > 60:  # more than H: weights are V × H
                assert seen.elements < tokens * base.architecture.vocab // layout.tensor_size, (
                    name,
                    seen.operator,
                    seen.elements,
                    tokens,
                )
        if layout.rank == 0:
            np.savez(root / f"{name}.npz", **{str(i): values for i, values in found.items()})
            print(name, flush=True)
        dist.barrier()
        parallel.destroy()


def _config() -> Config:
    return Config(
        rollout=RolloutConfig(max_response_tokens=120, prompts_per_step=2, samples_per_prompt=2),
        compare=CompareConfig(temperature=0.8, top_k=TOP_K),
        **_small(),
    )


def _small() -> dict:
    from fipo_megatron.config import DataConfig, RewardConfig

    actor = ActorConfig(token_budget=BUDGET, prompts_per_mini_batch=1)
    return {"data": DataConfig(max_prompt_tokens=40), "reward": RewardConfig(overlong_buffer_tokens=0), "actor": actor}
