"""The batch of a step: its trajectories by name and length, split into mini-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fipo_megatron.config import AlgorithmConfig, Config
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.packing import split_mini_batches
from fipo_megatron.data.trajectory import Group, Trajectory


@dataclass(frozen=True)
class Batch:
    """The trajectories of a step as every rank knows them: names and lengths, no tokens.

    Attributes:
        names: ``Trajectory.name`` by trajectory index.
        lengths: Tokens of each trajectory, prompt included.
        mini_batches: Trajectory indices of each optimizer step.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    mini_batches: tuple[tuple[int, ...], ...]


def build_batch(records: Sequence[GroupRecord], config: Config, step: int) -> Batch:
    """Numbers the trajectories of a step by prompt id and shuffles whole groups into mini-batches.

    The result does not depend on the order in which the groups arrived.

    Args:
        records: Metadata of every group of the step.
        config: The configuration; ``actor.prompts_per_mini_batch`` and ``seed`` are read.
        step: Number of the step; part of the shuffle's seed.
    """
    ordered = sorted(records, key=lambda record: record.prompt)
    return Batch(
        tuple(name for record in ordered for name in record.names),
        tuple(length for record in ordered for length in record.lengths),
        _shuffled_mini_batches([len(record.samples) for record in ordered], config, step),
    )


def build_sft_batch(examples: Sequence[Trajectory], config: Config, step: int) -> Batch:
    """Shuffles SFT examples into mini-batches; each example is a group of its own. See :func:`build_batch`."""
    return Batch(
        tuple(example.name for example in examples),
        tuple(len(example) for example in examples),
        _shuffled_mini_batches([1] * len(examples), config, step),
    )


def _shuffled_mini_batches(group_sizes: Sequence[int], config: Config, step: int) -> tuple[tuple[int, ...], ...]:
    seed = (config.seed << 32) + step
    return tuple(map(tuple, split_mini_batches(group_sizes, config.actor.prompts_per_mini_batch, seed=seed)))


def compute_advantages(groups: Iterable[Group], algorithm: AlgorithmConfig) -> list[Group]:
    """Returns the groups with every trajectory's advantage relative to its group.

    Responses whose check failed have no reward: they are not in the group's statistics, and their advantage is 0. So is
    that of a single response that is left.

    Args:
        groups: Scored groups of at least two responses.
        algorithm: ``advantage_baseline`` and ``advantage_epsilon`` are read.

    Raises:
        ValueError: See :func:`.algorithm.advantages.group_advantages`.
    """
    import torch  # takes a second: the entry point imports this module before it has read the configuration

    from fipo_megatron.algorithm.advantages import group_advantages

    groups = list(groups)
    rewards, ids, names = [], [], []
    for number, group in enumerate(groups):
        scored = [t for t in group.trajectories if t.reward is not None or not t.failure]
        if len(scored) < 2 <= len(group.trajectories):
            continue
        rewards += [trajectory.reward for trajectory in scored]
        names += [(number, trajectory.sample) for trajectory in scored]
        ids += [number] * len(scored)
    relative = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(ids, dtype=torch.int64),
        algorithm.advantage_baseline,
        algorithm.advantage_epsilon,
    )
    advantages = dict(zip(names, relative.tolist(), strict=True))
    return [
        Group(
            group.prompt, tuple(t.with_advantage(advantages.get((number, t.sample), 0.0)) for t in group.trajectories)
        )
        for number, group in enumerate(groups)
    ]
