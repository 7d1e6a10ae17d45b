"""The SGLang servers that a client uses: which of them are alive, and which of them samples which group."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fipo_megatron.rollout.engine import EngineError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Worker:
    """A server, as the client knows it.

    Attributes:
        url: URL of the server.
        slots: Limit of the requests in flight.
        alive: Whether requests are sent to it.
        lost_because: Reason for which it was lost last.
        needs_weights: Whether it answers with outdated weights that only a weight sender can replace.
        tasks: Requests in flight, by request id.
        groups: Number of groups assigned to it.
        abandoned: Ids of attempts that it may still be sampling although nobody waits for them.
    """

    url: str
    slots: asyncio.Semaphore
    alive: bool = True
    lost_because: str = ""
    needs_weights: bool = False
    tasks: dict[str, asyncio.Task[Any]] = field(default_factory=dict)
    groups: int = 0
    abandoned: set[str] = field(default_factory=set)


class WorkerPool:
    """Assigns groups to the workers that are alive.

    Args:
        urls: URLs of the workers.
        router: URL to which requests are sent instead, or None; the router distributes them among the workers.
        concurrency: Requests in flight per worker; others wait.
        patience_seconds: Seconds to wait for any worker to return while none is alive.

    Attributes:
        workers: The workers, by URL.
        router: The router, or None.
        losses: Number of times a worker was lost.
        expected_version: Version of the weights that a returning worker must have; None for any.
        paused: Whether sampling is paused on all workers.
        resumed: Time of the last resume, of ``time.monotonic``.
    """

    def __init__(self, urls: Sequence[str], *, router: str | None, concurrency: int, patience_seconds: float) -> None:
        self.workers = {url: Worker(url, asyncio.Semaphore(concurrency)) for url in urls}
        self.router = Worker(router, asyncio.Semaphore(concurrency * len(urls))) if router else None
        self.patience_seconds = patience_seconds
        self.losses = 0
        self.expected_version: int | None = None
        self.paused = False
        self.resumed = -math.inf
        self._groups: dict[str, tuple[Worker, int]] = {}
        """The worker of a group, and the number of its requests in flight."""
        self._changed = asyncio.Event()
        """Set when a worker has returned, with current weights or without."""

    @property
    def alive(self) -> list[Worker]:
        """Workers that requests are sent to."""
        return [worker for worker in self.workers.values() if worker.alive]

    async def assign(self, group: str, last: Worker | None) -> Worker:
        """Returns the worker of a group, which keeps it while it is alive; waits while no worker is alive.

        Args:
            group: Name of the group.
            last: The worker that was assigned to this request before; None at its first attempt.

        Raises:
            EngineError: no worker returned in time, or one returned that needs weights which nobody here can send.
        """
        await self._until_any_is_alive()
        if self.router is not None:
            return self.router
        worker, count = self._groups.get(group, (None, 0))
        if worker is None or not worker.alive:
            worker = min(self.alive, key=lambda one: one.groups)
        self._unassign(group)
        worker.groups += 1
        self._groups[group] = worker, count + (last is None)
        return worker

    def release(self, group: str) -> None:
        """Notes that a request of a group has ended."""
        if group not in self._groups:
            return
        worker, count = self._groups[group]
        if count > 1:
            self._groups[group] = worker, count - 1
        else:
            self._unassign(group)
            del self._groups[group]

    def _unassign(self, group: str) -> None:
        if group in self._groups:
            self._groups[group][0].groups -= 1

    async def _until_any_is_alive(self) -> None:
        end = time.monotonic() + self.patience_seconds
        while not self.alive:
            self._changed.clear()
            if any(worker.needs_weights for worker in self.workers.values()):
                raise EngineError(self._none_has_returned())
            try:
                await asyncio.wait_for(self._changed.wait(), end - time.monotonic())
            except TimeoutError:
                raise EngineError(self._none_has_returned()) from None

    def _none_has_returned(self) -> str:
        lines = [f"{worker.url}: {worker.lost_because}" for worker in self.workers.values()]
        return f"no SGLang server has come back within {self.patience_seconds:g} s:\n" + "\n".join(lines)

    def lose(self, url: str, because: str = "its process has ended") -> None:
        """Sends no more requests to a worker, and restarts those in flight on others."""
        worker = self.workers[url]
        if worker.alive:
            logger.warning("lost %s: %s; %d requests are restarted", url, because, len(worker.tasks))
            self.losses += 1
        worker.alive, worker.lost_because = False, because
        for task in worker.tasks.values():
            task.cancel()

    def restore(self, url: str) -> None:
        """Sends requests to a worker again; it must have the current weights."""
        self.workers[url].alive, self.workers[url].needs_weights = True, False
        self._changed.set()

    def keep_out(self, worker: Worker, version: int, *, needs_weights: bool) -> None:
        """Notes that a lost worker answers again, with outdated weights."""
        worker.lost_because = f"is back with weights {version}, current are {self.expected_version}"
        worker.needs_weights = needs_weights
        self._changed.set()
