"""Assigns prompts to leaders. Every rank calls the same functions with the same metadata."""

from __future__ import annotations

from collections.abc import Sequence

from fipo_megatron.data.group_record import GroupRecord


def assign_prompts(wanted: int, partial: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Assigns the prompts of a batch to leaders, about as many to each.

    Partial groups come first; each stays with the leader that has it.

    Args:
        wanted: Number of prompts of the batch.
        partial: Number of partial groups of each leader.

    Returns:
        For each leader: the number of partial groups that it continues, and the indices of the new prompts that it
        begins.
    """
    left, taken = list(partial), [0] * len(partial)
    for _ in range(min(wanted, sum(partial))):
        most = max(range(len(left)), key=lambda n: (left[n], -n))
        left[most] -= 1
        taken[most] += 1
    loads = list(taken)
    new: list[list[int]] = [[] for _ in partial]
    for number in range(wanted - sum(taken)):
        least = min(range(len(loads)), key=lambda n: (loads[n], n))
        loads[least] += 1
        new[least].append(number)
    return taken, new


def interleave_by_leader(by_leader: Sequence[Sequence[GroupRecord]]) -> list[GroupRecord]:
    """Returns the groups of all leaders in one order: the first of each leader, then the second of each, and so on."""
    longest = max(map(len, by_leader), default=0)
    return [records[place] for place in range(longest) for records in by_leader if place < len(records)]
