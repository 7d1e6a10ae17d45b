"""Signs of progress of this process: phases, micro-batches, sampled tokens, buckets of weights.

:mod:`.trainer.rank_monitor` ends a run if none of its ranks gives a sign for ``run.hang_seconds``. Signs are counted
for the whole process; what each of them means does not matter.
"""

from __future__ import annotations

_signs = 0


def sign() -> None:
    """Counts a sign of progress. Without a lock: of two signs at the same moment, one may be lost."""
    global _signs
    _signs += 1


def signs() -> int:
    """Returns the number of signs so far."""
    return _signs
