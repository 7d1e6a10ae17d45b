"""Chooses which nodes are at fault if something fails between two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def nodes_at_fault(failures: Iterable[tuple[int, int]]) -> set[int]:
    """Returns few nodes without which no failure is left.

    The node that takes part in the most failures comes first; of nodes with equally many, that with the highest rank,
    so that node 0, to which all connect, comes last.

    Args:
        failures: Pairs of nodes between which something fails; the order within a pair does not matter.
    """
    left = {tuple(sorted(pair)) for pair in failures}
    chosen: set[int] = set()
    while left:
        counts = Counter(node for pair in left for node in pair)
        worst = max(counts, key=lambda node: (counts[node], node))
        chosen.add(worst)
        left = {pair for pair in left if worst not in pair}
    return chosen
