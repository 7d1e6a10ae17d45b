"""From the groups of a step to what the actor trains on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fipo_megatron.algorithm.advantages import group_advantages
from fipo_megatron.config import AlgorithmConfig, Config
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.packing import split_mini_batches
from fipo_megatron.data.trajectory import Group


@dataclass(frozen=True)
class Batch:
    """A step's trajectories as every rank knows them: names and lengths, no tokens.

    Attributes:
        names: ``Trajectory.name``, by index.
        lengths: Tokens of each with its prompt.
        mini_batches: Indices of the trajectories of each optimizer step.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    mini_batches: tuple[tuple[int, ...], ...]


def build_batch(records: Sequence[GroupRecord], config: Config, step: int) -> Batch:
    """Numbers the trajectories by prompt, not by when they came, and deals whole groups into mini-batches.

    Args:
        records: Of the groups of the step.
        config: Of the run.
        step: Number of the step: of the shuffle.
    """
    ordered = sorted(records, key=lambda record: record.prompt)
    mini_batches = split_mini_batches(
        [len(record.samples) for record in ordered],
        config.actor.prompts_per_mini_batch,
        seed=(config.seed << 32) + step,
    )
    return Batch(
        tuple(name for record in ordered for name in record.names),
        tuple(length for record in ordered for length in record.lengths),
        tuple(map(tuple, mini_batches)),
    )


def compute_advantages(groups: Iterable[Group], algorithm: AlgorithmConfig) -> list[Group]:
    """The groups with the advantage of every response relative to its group."""
    found = []
    for group in groups:
        rewards = torch.tensor([t.reward for t in group.trajectories], dtype=torch.float64)
        ids = torch.zeros(len(rewards), dtype=torch.int64)
        advantages = group_advantages(rewards, ids, algorithm.advantage_baseline, algorithm.advantage_epsilon)
        trajectories = tuple(
            replace(t, advantage=float(a)) for t, a in zip(group.trajectories, advantages, strict=True)
        )
        found.append(Group(group.prompt, trajectories))
    return found
