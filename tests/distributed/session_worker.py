"""Runs three steps of rollout and training with an actor of several ranks, in each layout; run under torchrun."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.actor.mismatch import log_prob_differences
from fipo_megatron.config import Config, ParallelConfig
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.data.trajectory import Prompt, Score, Trajectory
from fipo_megatron.rollout.engine_factory import HostInfo
from fipo_megatron.rollout.scatter import scatter_trajectories
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.weights.architecture import Architecture

LAYOUTS = {
    "DP2": ParallelConfig(),
    "TP2": ParallelConfig(tensor_parallel=2),
    "PP2": ParallelConfig(pipeline_parallel=2),
    "CP2": ParallelConfig(context_parallel=2),
}


class Prompts:
    """An endless supply of prompts."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, count: int) -> list[Prompt]:
        first, self.given = self.given, self.given + count
        return [prompt(n) for n in range(first, self.given)]


def prompt(number: int) -> Prompt:
    tokens = np.random.default_rng(number).integers(2, 61, 6 + number % 5)
    return Prompt(str(number), tokens.astype(np.int32), "")


async def score(trajectory: Trajectory) -> Score:
    return Score(float(trajectory.sample % 2), trajectory.sample % 2)


def host_of(layout: parallel.RankLayout, directory: Path) -> HostInfo:
    return HostInfo(layout.rank, layout.rank, (0,), cuda=False, directory=directory)


def learn(session: RolloutSession, actor: MegatronActor, prompts: Prompts, version: int) -> dict[str, float]:
    """Runs a step; returns its metrics and the largest difference of the engine's log-probs from the actor's."""
    with session.serving_weights(version):
        sampled = session.sample(prompts)
    names = [name for record in sampled.records for name in record.names]
    lengths = [length for record in sampled.records for length in record.lengths]
    plan = actor.plan(lengths, [range(len(lengths))])
    mine = scatter_trajectories(session.routes, sampled.groups, names, plan)
    mine = {i: replace(t, advantage=1.0 if t.reward else -1.0) for i, t in mine.items()}
    old = actor.log_probs(plan, mine)
    differences = log_prob_differences(actor, plan, mine, old)
    (metrics,) = actor.update(plan, mine, old)
    return {
        "mismatch": float(differences.max()),
        "tokens": [len(differences), sum(sum(record.response_tokens) for record in sampled.records)],
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "versions": sorted({span.weight_version for t in mine.values() for span in t.spans}),
    }


def main(config_json: str, directory: str) -> None:
    from pydantic import TypeAdapter

    warnings.simplefilter("ignore")
    base = TypeAdapter(Config).validate_json(config_json)
    for name, layout_config in LAYOUTS.items():
        config = replace(base, actor=replace(base.actor, parallel=layout_config))
        layout = parallel.initialize(layout_config, seed=1)
        architecture = Architecture.from_directory(config.model.path)
        actor = MegatronActor(
            config, architecture, layout, lambda c, a=architecture, o=layout: load_hf(c, a, o, base.model.path)
        )
        session = RolloutSession(
            config,
            actor,
            architecture,
            host_of(layout, Path(directory)),
            parallel.store(),
            tokenizer=load_tokenizer(config.model.path) if config.rollout.engine == "sglang" else None,
            scorer=score,
            stop_token_ids=(1,),
            probe=[prompt(number) for number in range(990, 998)],
        )
        prompts = Prompts()
        result = [learn(session, actor, prompts, version) for version in range(3)]
        session.close()
        if layout.rank == 0:
            Path(directory, f"{name}.json").write_text(json.dumps(result))
        parallel.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
