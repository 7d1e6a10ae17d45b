"""Makes the engine wait until everything that follows from a finished response has been decided."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TURNS = 32
"""Turns of the event loop within which the consequences of a response take effect; they take about eight."""


class DecisionBarrier:
    """Blocks whose outcome decides what is sampled next, and the wait for all of them.

    The blocks end in the order in which they began, so that no result depends on how long they take.
    """

    def __init__(self) -> None:
        self._open = self._count = 0
        self._closed = asyncio.Event()
        self._last: asyncio.Event | None = None

    @asynccontextmanager
    async def deciding(self) -> AsyncIterator[None]:
        """Opens a block; unless it raises, it ends after the block that was opened before it."""
        before, mine = self._last, asyncio.Event()
        self._last = mine
        self._open += 1
        try:
            yield
            if before is not None:
                await before.wait()
        finally:
            mine.set()
            self._open -= 1
            self._count += 1
            self._closed.set()

    async def wait(self) -> None:
        """Waits until no block is open, and until no further one opens within some turns of the event loop."""
        await yield_turns()
        seen = self._count if not self._open else -1
        while self._open or seen != self._count:  # the turns are counted from the end of the last block
            if self._open:
                self._closed.clear()
                await self._closed.wait()
            seen = self._count
            await yield_turns()


async def yield_turns() -> None:
    """Lets the other tasks of the event loop run for some turns."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
