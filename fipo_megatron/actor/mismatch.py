"""The mismatch between the engine's log-probs and the actor's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fipo_megatron.actor.actor import MegatronActor, StoredLogProbs, Trajectories
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.data.packing import MiniBatch


def max_log_prob_difference(
    actor: MegatronActor, plan: Sequence[MiniBatch], trajectories: Trajectories, old: StoredLogProbs
) -> float:
    """Computes the largest |log π_old − log π_behaviour| over all tokens of the plan. A collective.

    Args:
        actor: Actor of this rank.
        plan: Plan passed to :meth:`.actor.MegatronActor.log_probs`.
        trajectories: Trajectories passed to it.
        old: Log-probs that it returned.

    Returns:
        The largest difference in nats, the same on every rank; inf if a log-prob is NaN.
    """
    largest = torch.zeros((), dtype=torch.float64, device=actor.layout.device)
    for mini_batch, stored in zip(plan, old, strict=True):
        members = mini_batch.micro_batches[actor.layout.data_rank]
        micros = local_micro_batches(members, trajectories, actor.layout, token_multiple=actor.token_multiple)
        for micro, found in zip(micros, stored, strict=True):
            if found is not None and micro.mask.any():
                gap_T = (found.log_probs - micro.behaviour_log_probs)[micro.mask].double().abs()
                largest = torch.maximum(largest, gap_T.nan_to_num(nan=math.inf).max())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
