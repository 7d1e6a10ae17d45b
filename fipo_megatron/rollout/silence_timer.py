"""Seconds since a sign of life of another process, without the time in which this process did not run itself."""

from __future__ import annotations

import time

_LONGEST_INTERVAL = 2.0
"""Seconds between two looks that count at most. A job that was suspended as a whole must not find its ranks silent."""


class SilenceTimer:
    """Counts the seconds of silence; it must be asked at regular intervals."""

    def __init__(self) -> None:
        self._silent = 0.0
        self._last = time.monotonic()

    def heard(self) -> None:
        """Starts again from 0, after a sign of life."""
        self._silent = 0.0
        self._last = time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds since the last sign of life in which this process was running."""
        now = time.monotonic()
        self._silent += min(now - self._last, _LONGEST_INTERVAL)
        self._last = now
        return self._silent
