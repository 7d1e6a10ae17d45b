"""The rule that decides which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def steps_to_keep(steps: Sequence[int], newest: int, scores: Mapping[int, float], safe_step: int | None) -> set[int]:
    """Returns the steps whose checkpoints are kept: the newest, the best, and those that a rollback may need.

    Args:
        steps: Steps of all checkpoints.
        newest: Number of newest checkpoints to keep.
        scores: Evaluation accuracy by step; empty if the best checkpoint need not be kept.
        safe_step: A checkpoint of this step or an earlier one precedes any collapse. The newest such checkpoint is
            kept, and the one after it: ``safe_step`` grows, and by the time it reaches that one, more than ``newest``
            checkpoints may be newer.
    """
    kept = {*sorted(steps)[-newest:]}
    kept |= {*sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))[-1:]}
    if safe_step is not None:
        kept |= {*sorted(step for step in steps if step <= safe_step)[-1:]}
        kept |= {*sorted(step for step in steps if step > safe_step)[:1]}
    return kept
