"""Who samples what: decided from metadata, by the same function on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from fipo_megatron.data.group_record import GroupRecord


def assign_prompts(wanted: int, unfinished: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Shares a batch of prompts among leaders, about as many for each: first what was begun, which stays where it is.

    Args:
        wanted: Prompts of the batch.
        unfinished: How many each leader has begun.

    Returns:
        For each leader: how many of those it goes on with, and which of the new prompts it begins.
    """
    left, taken = list(unfinished), [0] * len(unfinished)
    for _ in range(min(wanted, sum(unfinished))):
        most = max(range(len(left)), key=lambda n: (left[n], -n))
        left[most] -= 1
        taken[most] += 1
    loads, new = list(taken), [[] for _ in unfinished]  # type: tuple[list[int], list[list[int]]]
    for number in range(wanted - sum(taken)):
        least = min(range(len(loads)), key=lambda n: (loads[n], n))
        loads[least] += 1
        new[least].append(number)
    return taken, new


def interleave_by_leader(by_leader: Sequence[Sequence[GroupRecord]]) -> list[GroupRecord]:
    """Groups of all leaders in one order: the first of each, then the second of each, and so on."""
    longest = max(map(len, by_leader), default=0)
    return [records[place] for place in range(longest) for records in by_leader if place < len(records)]
