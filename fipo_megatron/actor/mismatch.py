"""How far the engine's log-probs are from the actor's."""

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
    """Largest |log π_old − log π_behaviour| of any token of the plan, the same on every rank: a collective.

    Args:
        actor: Of this rank.
        plan: As given to :meth:`.actor.MegatronActor.log_probs`.
        trajectories: As given there.
        old: What it returned.

    Returns:
        inf where a log-prob is not a number.
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
