"""Counts the memory of an actor over one step, on real tensors or on fake ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from fipo_megatron.actor.actor import MegatronActor, Trajectories
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.plan.live_bytes import LiveBytes
from fipo_megatron.plan.rank_memory import PassMemory, RankMemory


def longest_mini_batch(tokens: int, micro_batches: int, data_parallel_size: int) -> tuple[MiniBatch, list[Trajectory]]:
    """Returns a mini-batch of micro-batches that each hold one sequence of ``tokens`` tokens, and the sequence."""
    response = tokens - 1
    trajectory = Trajectory(
        Prompt("plan", np.zeros(1, np.int32), ""),
        0,
        np.zeros(response, np.int32),
        np.full(response, -1.0, np.float32),
        np.ones(response, np.bool_),
        advantage=1.0,
    )
    return MiniBatch((((0,),) * micro_batches,) * data_parallel_size), [trajectory]


def measure(
    actor: MegatronActor, mini_batch: MiniBatch, trajectories: Trajectories, weight_copies: Sequence[Tensor] = ()
) -> RankMemory:
    """Runs the passes of one step and counts their memory. A collective; changes the weights.

    Args:
        actor: The actor, before its first step.
        mini_batch: Mini-batch of the update; the log-prob pass takes the same.
        trajectories: Trajectories of the mini-batch.
        weight_copies: FP8 copies of the weights.
    """
    parameters, gradients = actor.parameters(), actor.gradients()
    known = [*parameters, *gradients, *actor.optimizer_state(), *weight_copies]
    with LiveBytes(known) as log_probs:
        old = actor.log_probs([mini_batch], trajectories)
    del old
    with LiveBytes(known) as update:  # as the first one of a step, which also computes the entropies of π_old
        actor.forward_backward(mini_batch, trajectories, None)
    with LiveBytes(known) as step:
        actor.optimizer.step()
    optimizer = num_bytes(actor.optimizer_state())
    actor.zero_grad()
    new_state = optimizer - num_bytes(known) + num_bytes([*parameters, *gradients, *weight_copies])
    return RankMemory(
        parameters=num_bytes(parameters),
        gradients=num_bytes(gradients),
        optimizer=optimizer,
        weight_copies=num_bytes(weight_copies),
        log_probs=PassMemory(log_probs.held, log_probs.peak),
        update=PassMemory(update.held, update.peak),
        optimizer_step=PassMemory(0, step.peak - new_state),
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages of the tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())
