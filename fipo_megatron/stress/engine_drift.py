"""The difference between the engine's log-probs and the actor's by position, and what it does to Future-KL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.algorithm.future_kl import future_kl
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.stress.stress_settings import StressSettings

_PARTS = 8

Values = NDArray[np.float64]


def measure_drift(
    actor: MegatronActor, settings: StressSettings, length: int, trajectories: Sequence[Trajectory]
) -> dict[str, Any]:
    """Compares the log-probs of responses under the actor with those of the engine. A collective.

    Future-KL is linear in the shifts of the tokens. If the engine's log-probs took the place of π_old, it would change
    by the Future-KL of the differences.

    Args:
        actor: Actor of this rank, with the weights that the engine served.
        settings: Settings of the stress run.
        length: Tokens of a sequence; :attr:`.MegatronActor.config` becomes the configuration of this length.
        trajectories: Responses with the engine's log-probs, the same on every rank.

    Returns:
        The row of ``stress.json``, the same on every rank.
    """
    actor.config = settings.configs[length]
    plan = actor.plan([len(trajectory) for trajectory in trajectories], [range(len(trajectories))])
    found = response_log_probs(actor, plan, trajectories)
    differences = [
        log_probs - trajectory.behaviour_log_probs.astype(np.float64)
        for log_probs, trajectory in zip(found, trajectories, strict=True)
    ]
    half_life = actor.config.algorithm.half_life
    summed = [future_kl(torch.from_numpy(difference), half_life).numpy() for difference in differences]
    longest = max(map(len, differences))
    edges = np.linspace(0, longest, _PARTS + 1).astype(int)
    whole = _statistics(differences, summed, 0, longest)
    return {
        "length": length,
        "responses": len(trajectories),
        "half_life": half_life,
        "positions": [
            {"from": int(start), "to": int(end), **_statistics(differences, summed, start, end)}
            for start, end in pairwise(edges)
            if end > start
        ],
        "metrics": whole,
    }


def _statistics(differences: Sequence[Values], summed: Sequence[Values], start: int, end: int) -> dict[str, float]:
    """Returns mean, 99 % quantile and largest absolute value of the tokens from ``start`` to ``end``."""
    shift, future = (np.abs(np.concatenate([one[start:end] for one in part])) for part in (differences, summed))
    return {
        "mean": float(shift.mean()),
        "p99": float(np.quantile(shift, 0.99)),
        "max": float(shift.max()),
        "future_kl_mean": float(future.mean()),
        "future_kl_p99": float(np.quantile(future, 0.99)),
        "future_kl_max": float(future.max()),
    }


def response_log_probs(
    actor: MegatronActor, plan: Sequence[MiniBatch], trajectories: Sequence[Trajectory]
) -> list[Values]:
    """Returns the actor's log-probs of every response, ``[R]`` each, on every rank. A collective."""
    layout, mine = actor.layout, []
    for mini_batch, stored in zip(plan, actor.log_probs(plan, trajectories), strict=True):
        members = mini_batch.micro_batches[layout.data_rank]
        micros = local_micro_batches(members, trajectories, layout, token_multiple=actor.token_multiple)
        for indices, micro, found in zip(members, micros, stored, strict=True):
            if found is None or layout.tensor_rank:  # tensor-parallel ranks hold the same tokens
                continue
            values, positions = found.log_probs.double().cpu().numpy(), micro.position_ids[0].cpu().numpy()
            mask = micro.mask.cpu().numpy()
            ends = np.cumsum(micro.shards.chunk_lengths.cpu().numpy() * micro.shards.num_slots)
            for index, start, end in zip(indices, [0, *ends[:-1]], ends, strict=bool(indices)):
                here = np.arange(start, end)[mask[start:end]]
                # The log-prob of token p + 1 stands at position p.
                mine.append((index, positions[here] + 1 - len(trajectories[index].prompt.tokens), values[here]))
    everyone: list[list[tuple[int, NDArray[np.int64], Values]]] = [[]] * layout.world_size
    dist.all_gather_object(everyone, mine)
    whole = [np.full(len(trajectory.tokens), np.nan) for trajectory in trajectories]
    for part in everyone:
        for index, positions, values in part:
            whole[index][positions] = values
    return whole
