"""The protocol by which the embedded engine and its driver take turns, so that no result depends on time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager


class TurnTaking:
    """Counts the responses that are with the driver. The engine samples only while there are none.

    The driver announces its responses, which are with it at first, and may announce more while it has one. A request
    hands a response to the engine. The engine hands it back when it is finished or aborted. The driver then requests
    the rest, or decides what follows from the response and gives it up. Without a driver nothing is counted, and the
    engine never waits.
    """

    def __init__(self) -> None:
        self._driven = False
        self._with_driver = 0
        self._engines_turn = asyncio.Event()
        self._undecided: dict[str, asyncio.Event] = {}
        """Finished responses in the order in which they were returned; the event of the first is set."""
        self.end()

    @contextmanager
    def driving(self, responses: int) -> Iterator[Callable[[int], None]]:
        """Opens a block in which a driver announces this many responses; yields a function that announces more.

        Raises:
            RuntimeError: There is a driver already.
        """
        if self._driven:
            raise RuntimeError("the embedded engine has a driver already")
        self._driven = True
        self._add(responses)
        try:
            yield self._add
        finally:
            self.end()

    def end(self) -> None:
        """Ends the driver's block; the engine waits for nothing any more."""
        self._driven, self._with_driver = False, 0
        self._engines_turn.set()
        for turn in self._undecided.values():
            turn.set()
        self._undecided = {}

    @property
    def is_engines_turn(self) -> bool:
        """Whether no response is with the driver."""
        return not self._with_driver

    async def wait_for_driver(self) -> None:
        """Waits until no response is with the driver."""
        await self._engines_turn.wait()

    def hand_over(self) -> None:
        """Counts a response that the driver has requested.

        Raises:
            RuntimeError: The driver has announced fewer responses.
        """
        if self._driven and not self._with_driver:
            raise RuntimeError("the driver of the embedded engine requests more responses than it has announced")
        self._add(-1)

    def hand_back(self, request_id: str, *, finished: bool) -> None:
        """Counts a response that the engine returns; decisions on finished ones follow in this order."""
        self._add(1)
        if self._driven and finished:
            self._undecided[request_id] = asyncio.Event()
            self._call_first()

    @asynccontextmanager
    async def deciding(self, request_id: str) -> AsyncIterator[None]:
        """Opens a block in which the driver decides on a response; see :meth:`.engine.RolloutEngine.deciding`."""
        if (turn := self._undecided.get(request_id)) is not None:
            await turn.wait()
        try:
            yield
        finally:
            self._undecided.pop(request_id, None)
            self._call_first()
            self._add(-1)

    def _call_first(self) -> None:
        for turn in self._undecided.values():
            turn.set()
            return

    def _add(self, responses: int) -> None:
        if not self._driven:
            return
        self._with_driver += responses
        if self._with_driver:
            self._engines_turn.clear()
        else:
            self._engines_turn.set()
