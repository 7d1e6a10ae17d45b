"""Samples with two leaders that have an engine each, and with ranks that only train; run under torchrun."""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.config import ParallelConfig
from fipo_megatron.data.packing import plan_micro_batches
from fipo_megatron.data.trajectory import Prompt, Score, Trajectory
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import EngineError, LostRankError, SamplingParameters
from fipo_megatron.rollout.sampler import Sampler, SamplingExhaustedError
from fipo_megatron.rollout.sampler_settings import SamplerSettings
from fipo_megatron.rollout.scatter import Routes, scatter_trajectories
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

SETTINGS = SamplerSettings(
    prompts_per_step=6, samples_per_prompt=4, sampling=SamplingParameters(1.0, 12), run_seed=5, max_batches=3
)
RIGHT = [0, 2, 4, 1, 2, 3, 4, 0, 2, 1, 1, 2, 3, 2, 0, 2, 3, 1, 1, 2]


class Prompts:
    """Prompts of which number n has ``RIGHT[n % 20]`` right responses."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, count: int) -> list[Prompt]:
        first, self.given = self.given, self.given + count
        return [
            Prompt(str(n), np.random.default_rng(n).integers(0, 61, 5 + n % 7).astype(np.int32), "")
            for n in range(first, self.given)
        ]


async def score(trajectory: Trajectory) -> Score:
    right = trajectory.sample < RIGHT[int(trajectory.prompt.id) % len(RIGHT)]
    return Score(1.0 if right else -1.0, int(right))


def describe(t: Trajectory) -> dict:
    return {"tokens": t.tokens.tolist(), "log_probs": t.behaviour_log_probs.tolist(), "reward": t.reward}


def steps(path: str, layout: parallel.RankLayout, store: dist.Store) -> list[dict]:
    """Samples two steps; returns every trajectory that this rank would train on."""
    routes = Routes.build(layout.data_rank)
    leads = layout.rank in routes.leaders
    sampler = Sampler(
        EmbeddedEngine(path) if leads else None,
        SETTINGS,
        score,
        StoreCoordinator(store, layout.rank, routes.leaders, layout.world_size),
    )
    prompts, found = Prompts(), []

    async def run() -> list:
        return [await sampler.step(prompts, 0) for _ in range(2)]

    for sampled in asyncio.run(run()):
        names = [name for record in sampled.records for name in record.names]
        lengths = [length for record in sampled.records for length in record.lengths]
        plan = plan_micro_batches(lengths, [range(len(lengths))], token_budget=64, data_parallel_size=layout.data_size)
        mine = scatter_trajectories(routes, sampled.groups, names, plan)
        assert sorted(mine) == sorted(
            i for mini in plan for micro in mini.micro_batches[layout.data_rank] for i in micro
        )
        if layout.data_size == layout.world_size:  # what stays on its rank is not copied
            own = {t.name: t for group in sampled.groups for t in group.trajectories}
            assert all(t is own.get(t.name, t) for t in mine.values())
        found.append(
            {
                "names": names,
                "rewards": [reward for record in sampled.records for reward in record.rewards],
                "statistics": dict(sampled.statistics),
                "mine": {names[i]: describe(t) for i, t in mine.items()},
                "sampled": len(sampled.groups),
                "given": prompts.given,
            }
        )
    return found


def over_sampling(path: str, layout: parallel.RankLayout, store: dist.Store) -> dict:
    """Samples steps in which the tail is aborted on all leaders as soon as they have enough groups together."""
    settings = replace(
        SETTINGS,
        over_sampling=3.0,
        dynamic_sampling=False,
        max_staleness=1,
        sampling=SamplingParameters(1.0, 80, stop_token_ids=(7, 9, 11)),
    )
    routes = Routes.build(layout.data_rank)
    leads = layout.rank in routes.leaders
    sampler = Sampler(
        EmbeddedEngine(path, slots=16) if leads else None,
        settings,
        score,
        StoreCoordinator(dist.PrefixStore("over", store), layout.rank, routes.leaders, layout.world_size),
    )
    prompts = Prompts()

    async def run() -> list:
        return [await sampler.step(prompts, 0) for _ in range(3)]

    found = asyncio.run(run())
    return {
        "records": [[record.prompt for record in sampled.records] for sampled in found],
        "statistics": [dict(sampled.statistics) for sampled in found],
    }


def failures(path: str, layout: parallel.RankLayout, store: dist.Store) -> list[str]:
    """Returns the error of this rank when the last leader's engine fails, no group is kept, and a rank is silent."""
    routes = Routes.build(layout.data_rank)
    leads, said = layout.rank in routes.leaders, []

    async def broken() -> None:
        engine = EmbeddedEngine(path) if leads else None
        if layout.rank == routes.leaders[-1]:
            await engine.release_memory("weights")
        coordinator = StoreCoordinator(
            dist.PrefixStore("broken", store), layout.rank, routes.leaders, layout.world_size
        )
        await Sampler(engine, SETTINGS, score, coordinator).step(Prompts(), 0)

    async def refused() -> None:
        """Samples with a request on one rank that no engine can serve."""
        engine = EmbeddedEngine(path) if leads else None
        if layout.rank == routes.leaders[-1]:
            engine.context = 10
        coordinator = StoreCoordinator(
            dist.PrefixStore("refused", store), layout.rank, routes.leaders, layout.world_size
        )
        sampler = Sampler(engine, SETTINGS, score, coordinator)
        try:
            await sampler.step(Prompts(), 0)
        finally:
            await coordinator.gather({"again": layout.rank})  # all ranks are still in the same round

    async def wrong(trajectory: Trajectory) -> Score:
        return Score(-1.0, 0)

    async def exhausted() -> None:
        coordinator = StoreCoordinator(
            dist.PrefixStore("exhausted", store), layout.rank, routes.leaders, layout.world_size
        )
        await Sampler(EmbeddedEngine(path) if leads else None, SETTINGS, wrong, coordinator).step(Prompts(), 0)

    async def silent() -> None:
        coordinator = StoreCoordinator(
            dist.PrefixStore("silent", store),
            layout.rank,
            range(layout.world_size),
            layout.world_size,
            silence_seconds=0.5,
        )
        if layout.rank == layout.world_size - 1:
            await asyncio.sleep(2.5)
            coordinator.look()
        await coordinator.gather({})

    for attempt in (broken, refused, exhausted, silent):
        try:
            asyncio.run(attempt())
            said.append("nothing")
        except (EngineError, LostRankError, SamplingExhaustedError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def run_ahead(layout: parallel.RankLayout, store: dist.Store) -> list[list[int]]:
    """Gathers eight times; rank 0 alone reports, and the other ranks read slowly."""
    coordinator = StoreCoordinator(dist.PrefixStore("ahead", store), layout.rank, (0,), layout.world_size)

    async def run() -> list[list[int]]:
        found = []
        for number in range(8):
            await asyncio.sleep(0.1 * (layout.rank > 0))
            found.append(await coordinator.gather(number))
        return found

    return asyncio.run(run())


def main(path: str, directory: str) -> None:
    warnings.simplefilter("ignore")
    for name, config in {"DP2": ParallelConfig(), "TP2": ParallelConfig(tensor_parallel=2)}.items():
        layout = parallel.initialize(config, seed=1)
        store = dist.PrefixStore(name, parallel.store())
        result = {
            "steps": steps(path, layout, store),
            "ahead": run_ahead(layout, store),
            "over": over_sampling(path, layout, store),
            "failures": failures(path, layout, store),
        }
        Path(directory, f"{name}-{layout.rank}.json").write_text(json.dumps(result))
        parallel.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
