"""An event loop in a thread: servers are watched, and responses sampled, while the trainer computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_ALIVE_SECONDS = 1.0
"""Seconds after which it is checked whether the thread is alive."""


class EventLoopThread:
    """A thread that runs coroutines until :meth:`close`.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str = "rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine; ``result()`` of the returned future waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and waits for its result. Cancels it if the wait is interrupted."""
        future = self.begin(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a block in which the thread runs no callback; it begins after the callback in progress."""
        if self._loop.is_closed():
            yield
            return
        stopped, resumed = threading.Event(), threading.Event()

        def stand_still() -> None:
            stopped.set()
            resumed.wait()

        self._loop.call_soon_threadsafe(stand_still)
        try:
            while not stopped.wait(_ALIVE_SECONDS) and self._thread.is_alive():
                pass
            yield
        finally:
            resumed.set()

    def close(self) -> None:
        """Cancels the coroutines that still run, and ends the thread."""
        if self._loop.is_closed():
            return
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
