"""The mismatch between the engine's log-probs and the actor's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from fipo_megatron.actor.actor import MegatronActor, StoredLogProbs, Trajectories
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.data.packing import MiniBatch


def log_prob_differences(
    actor: MegatronActor, plan: Sequence[MiniBatch], trajectories: Trajectories, old: StoredLogProbs
) -> NDArray[np.float64]:
    """Computes |log π_old − log π_behaviour| of all tokens of the plan. A collective; meant for few tokens.

    Args:
        actor: Actor of this rank.
        plan: Plan passed to :meth:`.actor.MegatronActor.log_probs`.
        trajectories: Trajectories passed to it.
        old: Log-probs that it returned.

    Returns:
        ``[tokens]`` differences in nats, in ascending order, the same on every rank; NaN becomes inf.
    """
    layout, mine = actor.layout, []
    for mini_batch, stored in zip(plan, old, strict=True):
        members = mini_batch.micro_batches[layout.data_rank]
        micros = local_micro_batches(members, trajectories, layout, token_multiple=actor.token_multiple)
        for micro, found in zip(micros, stored, strict=True):
            if found is not None and layout.tensor_rank == 0:  # tensor-parallel ranks hold the same tokens
                gap_T = (found.log_probs - micro.behaviour_log_probs)[micro.mask].double().abs()
                mine.append(gap_T.nan_to_num(nan=math.inf).cpu().numpy())
    everyone: list[list[NDArray[np.float64]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return np.sort(np.concatenate([np.zeros(0), *(part for parts in everyone for part in parts)]))
