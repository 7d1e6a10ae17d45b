"""Points at which tests kill a run: ``FIPO_FAIL_AT=NAME:COUNT`` in the environment.

``NAME:COUNT:RANK`` kills this rank only, and ``NAME:COUNT:RANK:SIGNAL`` sends another signal, such as ``SIGSTOP``.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

NAMES = (
    *("sync", "evaluate", "generate", "response", "reward", "log_probs", "update", "observe", "save"),
    *("checkpoint_write", "checkpoint_publish", "checkpoint_published"),
)

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Kills or stops this process when it reaches the fail point NAME for the COUNT-th time, counted from 1.

    Raises:
        ValueError: There is no such fail point.
    """
    if name not in NAMES:
        raise ValueError(f"{name}: is not a fail point; valid: {', '.join(NAMES)}")
    selected = os.environ.get("FIPO_FAIL_AT")
    if not selected:
        return
    _reached[name] += 1
    point, count, *more = selected.split(":")
    rank, number = more[0] if more else None, more[1] if more[1:] else "SIGKILL"
    if (point, int(count)) == (name, _reached[name]) and rank in (None, os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.Signals[number])
