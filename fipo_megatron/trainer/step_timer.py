"""Wall time of a step and of its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fipo_megatron.observe import progress
from fipo_megatron.observe.profiling import span
from fipo_megatron.testing import fail_points


class StepTimer:
    """Adds up the seconds of each part of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def start(self) -> None:
        """Starts a step and forgets the one before."""
        self._seconds = {}
        self._start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a part of the step; the part is a fail point, too.

        Args:
            name: One of :data:`.testing.fail_points.NAMES`.
        """
        fail_points.reach(name)
        progress.sign()
        start = time.perf_counter()
        try:
            with span(name):
                yield
        finally:
            progress.sign()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part, and as ``step`` those since :meth:`start`."""
        return self._seconds | {"step": time.perf_counter() - self._start}
