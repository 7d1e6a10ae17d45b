"""Places where a run can be made to die, for tests of what is left: ``FIPO_FAIL_AT=NAME:COUNT`` in the environment."""

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
    """Kills this process (SIGKILL) where it is the COUNT-th time that it gets to NAME, counted from 1.

    Raises:
        ValueError: there is no such place.
    """
    if name not in NAMES:
        raise ValueError(f"{name}: is no fail point; there are {', '.join(NAMES)}")
    wanted = os.environ.get("FIPO_FAIL_AT")
    if not wanted:
        return
    _reached[name] += 1
    if wanted == f"{name}:{_reached[name]}":
        os.kill(os.getpid(), signal.SIGKILL)
