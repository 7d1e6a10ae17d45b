"""Packs trajectories into micro-batches.

:func:`plan_micro_batches` uses lengths alone, so every rank computes the same plan from metadata: mini-batches first,
then micro-batches under a token budget, balanced by cost over data-parallel ranks and equal in number on all of them.
:func:`pack` then packs the tokens of one micro-batch on the ranks that train on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.trajectory import Trajectory

MicroBatch = tuple[int, ...]
"""Indices of the trajectories that share one packed forward pass; empty for a filler."""


@dataclass(frozen=True)
class SequenceCost:
    """Cost of a pass over a sequence of L tokens: ``linear · L + quadratic · L²``, in whole FLOPs.

    Costs are integers, so sums do not depend on their order, and every rank computes the same plan.

    Attributes:
        linear: FLOPs per token: the matrix products.
        quadratic: FLOPs per squared length: the attention.
    """

    linear: int = 1
    quadratic: int = 0

    def of(self, length: int) -> int:
        """Returns the cost of one sequence."""
        return self.linear * length + self.quadratic * length * length


TOKENS = SequenceCost()
"""Cost that counts tokens."""


@dataclass(frozen=True)
class MiniBatch:
    """The micro-batches of one optimizer step.

    Attributes:
        micro_batches: Micro-batches of each data-parallel rank, in the order in which they run; the same number on
            every rank.
    """

    micro_batches: tuple[tuple[MicroBatch, ...], ...]


def split_mini_batches(group_sizes: Sequence[int], groups_per_mini_batch: int, seed: int) -> list[list[int]]:
    """Shuffles whole groups and splits them into mini-batches; the last mini-batch may hold fewer groups.

    Args:
        group_sizes: Trajectories of each group; trajectories are numbered group by group.
        groups_per_mini_batch: Prompts per optimizer step.
        seed: Seed of the shuffle; the same seed gives the same order.

    Returns:
        Indices of the trajectories of each mini-batch.

    Raises:
        ValueError: ``groups_per_mini_batch`` is less than 1.
    """
    if groups_per_mini_batch < 1:
        raise ValueError(f"groups_per_mini_batch: must be >= 1, got {groups_per_mini_batch}")
    starts = np.concatenate([[0], np.cumsum(group_sizes)])
    order = np.random.default_rng(seed).permutation(len(group_sizes))
    return [
        [i for group in order[first : first + groups_per_mini_batch] for i in range(starts[group], starts[group + 1])]
        for first in range(0, len(order), groups_per_mini_batch)
    ]


def plan_micro_batches(
    padded_lengths: Sequence[int],
    mini_batches: Sequence[Sequence[int]],
    *,
    token_budget: int,
    data_parallel_size: int = 1,
    micro_batch_multiple: int = 1,
    cost: SequenceCost = TOKENS,
) -> tuple[MiniBatch, ...]:
    """Assigns every trajectory of every mini-batch to a data-parallel rank and a micro-batch.

    The longest trajectories are placed first, each into the cheapest micro-batch with room for it; the number of
    micro-batches is the smallest for which all fit. Micro-batches that run at the same time on different ranks cost
    about the same, and the most expensive of them goes to the rank with the least cost so far.

    Args:
        padded_lengths: Tokens of each trajectory, padding included.
        mini_batches: Indices of the trajectories of each mini-batch.
        token_budget: Largest number of tokens in a micro-batch, over all ranks of its context-parallel group.
        data_parallel_size: Data-parallel ranks that share the trajectories.
        micro_batch_multiple: Divisor of the number of micro-batches per rank: the pipeline-parallel size under
            interleaved schedules. Fillers make up the number.
        cost: Cost of a sequence, which the ranks and micro-batches share equally.

    Returns:
        One :class:`MiniBatch` per mini-batch.

    Raises:
        ValueError: Trajectories are longer than the budget (the message names the first and counts them), a mini-batch
            is empty, or an index does not exist or occurs twice.
    """
    if min(token_budget, data_parallel_size, micro_batch_multiple) < 1:
        raise ValueError(
            "token_budget, data_parallel_size, micro_batch_multiple: must be >= 1, got "
            f"{token_budget}, {data_parallel_size}, {micro_batch_multiple}"
        )
    too_long = [i for i, length in enumerate(padded_lengths) if length > token_budget]
    if too_long:
        raise ValueError(
            f"token_budget: {len(too_long)} trajectories are longer than {token_budget} tokens, first number "
            f"{too_long[0]} with {padded_lengths[too_long[0]]}; a sequence is never split over micro-batches"
        )
    everything = [i for mini_batch in mini_batches for i in mini_batch]
    if len(set(everything)) < len(everything) or not set(everything) <= set(range(len(padded_lengths))):
        raise ValueError(f"mini_batches: each index must occur once and be in 0 … {len(padded_lengths) - 1}")
    plan = []
    for number, mini_batch in enumerate(mini_batches):
        if not len(mini_batch):
            raise ValueError(f"mini_batches: number {number} is empty")
        total = sum(padded_lengths[i] for i in mini_batch)
        per_rank = -(-total // (token_budget * data_parallel_size))
        per_rank = -(-per_rank // micro_batch_multiple) * micro_batch_multiple
        members = sorted(mini_batch, key=lambda i: (-padded_lengths[i], i))
        while (bins := _bins(padded_lengths, members, per_rank * data_parallel_size, token_budget, cost)) is None:
            per_rank += micro_batch_multiple
        plan.append(_assign(bins, data_parallel_size, lambda i: cost.of(padded_lengths[i])))
    return tuple(plan)


def _bins(
    lengths: Sequence[int], members: Sequence[int], num_bins: int, budget: int, cost: SequenceCost
) -> list[MicroBatch] | None:
    """Fills the bins equally by cost, or by tokens if only so all members fit; None if they do not fit."""
    by_cost = _fill(lengths, members, num_bins, budget, cost)
    return by_cost if by_cost is not None or not cost.quadratic else _fill(lengths, members, num_bins, budget, TOKENS)


def _fill(
    lengths: Sequence[int], members: Sequence[int], num_bins: int, budget: int, cost: SequenceCost
) -> list[MicroBatch] | None:
    """Places each member into the cheapest bin with room for it; None if no bin has room."""
    loads = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [budget] * num_bins
    shortest = lengths[members[-1]]
    for i in members:
        full = []
        while loads and room[loads[0][1]] < lengths[i]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, number = heapq.heappop(loads)
        bins[number].append(i)
        room[number] -= lengths[i]
        for one in (*full, (load + cost.of(lengths[i]), number)):
            if room[one[1]] >= shortest:
                heapq.heappush(loads, one)
    return [tuple(members) for members in bins]


def _assign(bins: Sequence[MicroBatch], ranks: int, cost_of: Callable[[int], int]) -> MiniBatch:
    """Assigns bins to ranks in rounds of falling cost; the rank with the least cost gets the most expensive bin."""
    costs = [sum(map(cost_of, members)) for members in bins]
    order = sorted(range(len(bins)), key=lambda number: (-costs[number], number))
    totals = [0] * ranks
    shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for first in range(0, len(order), ranks):
        round_ = order[first : first + ranks]
        for rank, number in zip(sorted(range(ranks), key=lambda rank: (totals[rank], rank)), round_, strict=True):
            shares[rank].append(bins[number])
            totals[rank] += costs[number]
    return MiniBatch(tuple(map(tuple, shares)))


def imbalance(plan: Sequence[MiniBatch], lengths: Sequence[int], cost: SequenceCost, *, lockstep: int = 1) -> float:
    """Returns the cost of the most expensive data-parallel rank over the mean of all, ≥ 1.

    Its inverse is the fraction of the time in which an average rank computes; in the rest it waits for the others.

    Args:
        plan: Mini-batches of a step. The ranks wait for each other at the end of each.
        lengths: Tokens of each trajectory.
        cost: Cost of a sequence.
        lockstep: Consecutive ranks that wait for each other in every micro-batch, because they share experts
            (:attr:`.ParallelConfig.data_ranks_in_lockstep`).
    """
    most = total = 0
    for mini_batch in plan:
        by_rank = [
            [sum(cost.of(lengths[i]) for i in members) for members in micro_batches]
            for micro_batches in mini_batch.micro_batches
        ]
        groups = [by_rank[first : first + lockstep] for first in range(0, len(by_rank), lockstep)]
        most += max(sum(map(max, zip(*group, strict=True))) for group in groups)
        total += sum(map(sum, by_rank))
    return most * len(plan[0].micro_batches) / total


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """One packed micro-batch: sequences one after the other, each padded at its end.

    Every per-token array lives at the predicting position: entry p belongs to the label, which is token p + 1. Labels
    are shifted here, once, over whole sequences; slicing for context parallelism comes after.

    Attributes:
        tokens: Token ids, ``[T]`` int64; 0 in the padding.
        labels: Next token of the same sequence, ``[T]`` int64; 0 at the last position and in the padding.
        position_ids: Positions from 0 in each sequence, continued through the padding, ``[T]`` int64.
        mask: Positions whose label is a response token to learn from, ``[T]`` bool.
        padding: Positions of padding, ``[T]`` bool; all positions of a filler.
        advantages: Advantage of the label, ``[T]`` float32; 0 outside the mask.
        behaviour_log_probs: The engine's log-prob of the label, ``[T]`` float32; 0 outside the response.
        lengths: Tokens of each sequence without padding, ``[S]`` int32.
        cu_seqlens: Boundaries of the padded sequences, ``[S + 1]`` int32. They remain those of the whole sequences when
            the per-token arrays are sliced.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    padding: NDArray[np.bool_]
    advantages: NDArray[np.float32]
    behaviour_log_probs: NDArray[np.float32]
    lengths: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]

    def slice(self, layout: CpLayout) -> PackedSequences:
        """Returns a context-parallel rank's part of every per-token array."""
        indices = layout.indices(self.cu_seqlens)
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        local = {name: array[indices] for name, array in arrays.items() if name not in ("lengths", "cu_seqlens")}
        return PackedSequences(**(arrays | local))


def packed_tokens(lengths: Sequence[int], layout: CpLayout, multiple_of: int = 1) -> int:
    """Returns the tokens of a packed micro-batch (:func:`pack`) over all context-parallel ranks, padding included."""
    return layout.padded_total(sum(map(layout.padded_length, lengths or [1])), multiple_of)


def pack(
    trajectories: Sequence[Trajectory], layout: CpLayout, *, multiple_of: int = 1, mask_truncated: bool = False
) -> PackedSequences:
    """Packs the trajectories of one micro-batch, whole; slice the result for a context-parallel rank.

    Args:
        trajectories: Trajectories in packing order. An empty sequence makes a filler: one fully masked sequence of the
            shortest valid length.
        layout: Layout that sets the padding; only its size matters.
        multiple_of: Divisor of the tokens of one context-parallel rank. The last sequence is padded up to it.
        mask_truncated: Whether responses that were cut off at the length limit are masked.

    Raises:
        ValueError: A trajectory has no advantage.
    """
    lengths = [len(trajectory) for trajectory in trajectories] or [1]
    cu_seqlens = np.cumsum([0] + [layout.padded_length(length) for length in lengths], dtype=np.int32)
    cu_seqlens[-1] = total = layout.padded_total(int(cu_seqlens[-1]), multiple_of)
    packed = PackedSequences(
        tokens=np.zeros(total, np.int64),
        labels=np.zeros(total, np.int64),
        position_ids=np.arange(total) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)),
        mask=np.zeros(total, np.bool_),
        padding=np.ones(total, np.bool_),
        advantages=np.zeros(total, np.float32),
        behaviour_log_probs=np.zeros(total, np.float32),
        lengths=np.array(lengths, np.int32),
        cu_seqlens=cu_seqlens,
    )
    for start, trajectory in zip(cu_seqlens[:-1], trajectories, strict=bool(trajectories)):
        if trajectory.advantage is None:
            raise ValueError(f"trajectory {trajectory.name}: advantage: missing")
        prompt, end = len(trajectory.prompt.tokens), len(trajectory)
        packed.tokens[start : start + prompt] = trajectory.prompt.tokens
        packed.tokens[start + prompt : start + end] = trajectory.tokens
        packed.padding[start : start + end] = False
        packed.labels[start : start + end - 1] = packed.tokens[start + 1 : start + end]
        response = slice(start + prompt - 1, start + end - 1)
        learn = trajectory.mask & (not (mask_truncated and trajectory.finish_reason == "length"))
        packed.mask[response] = learn
        packed.advantages[response] = np.where(learn, trajectory.advantage, 0.0)
        packed.behaviour_log_probs[response] = trajectory.behaviour_log_probs
    return packed
