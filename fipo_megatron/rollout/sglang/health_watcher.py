"""Checks SGLang servers periodically: drops those that stop sampling and uses those that have recovered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import aiohttp

from fipo_megatron.observe import progress
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.control import ControlClient
from fipo_megatron.rollout.sglang.responses import error_text
from fipo_megatron.rollout.sglang.worker_pool import Worker, WorkerPool

logger = logging.getLogger(__name__)

_NOTHING_SAMPLED = 503
"""Status of ``/health_generate`` of SGLang 0.5.23 after 20 s without a token, and while it starts or ends."""
_VERSION_SECONDS = 10


class HealthWatcher:
    """Checks every worker periodically, in a task of the event loop in which it is created.

    Args:
        pool: The workers.
        control: Client for the checks.
        busy: Returns whether any request is in flight or waits for a worker.
        progress_seconds: Seconds without a new token after which a worker with requests in flight counts as lost.
        look_seconds: Seconds between two checks.

    Attributes:
        on_returned: Called with the URL of a lost worker that answers again with outdated weights; must send it the
            current ones. None if nobody here can send them.
    """

    def __init__(
        self,
        pool: WorkerPool,
        control: ControlClient,
        *,
        busy: Callable[[], bool],
        progress_seconds: float,
        look_seconds: float,
    ) -> None:
        self.on_returned: Callable[[str], Awaitable[None]] | None = None
        self._pool, self._control, self._busy = pool, control, busy
        self._progress_seconds, self._look_seconds = progress_seconds, look_seconds
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            await asyncio.gather(*(self._check(worker) for worker in self._pool.workers.values()))

    async def _check(self, worker: Worker) -> None:
        pool = self._pool
        try:
            if not worker.alive:
                await self._try_again(worker)
            elif (worker.tasks or (pool.router and self._busy())) and not pool.paused:
                await self._until_it_samples(worker)
        except TimeoutError:
            if not pool.paused and time.monotonic() - pool.resumed > self._progress_seconds:
                pool.lose(worker.url, f"no progress for {self._progress_seconds:g} s")
        except (aiohttp.ClientError, OSError, EngineError) as error:
            if worker.alive:
                pool.lose(worker.url, f"{type(error).__name__}: {error}")

    async def _until_it_samples(self, worker: Worker) -> None:
        """Waits until the worker samples anything; an idle server samples one token for this request.

        Raises:
            EngineError: it answers with an error.
            TimeoutError: it sampled nothing for ``progress_seconds``.
        """
        async with asyncio.timeout(self._progress_seconds):
            while not self._pool.paused:
                status, body = await self._control.exchange(worker.url + "/health_generate", None)
                if status == 200:
                    progress.sign()
                    return
                if status != _NOTHING_SAMPLED:
                    raise EngineError(f"/health_generate: HTTP status {status}: {error_text(body)}")
                await asyncio.sleep(self._look_seconds)

    async def _try_again(self, worker: Worker) -> None:
        """Uses a lost worker again if it answers, has the current weights and samples."""
        async with asyncio.timeout(_VERSION_SECONDS):
            version = await self._control.weight_version(worker.url)
        expected = self._pool.expected_version
        if expected is not None and version != expected and self.on_returned is not None:
            await self.on_returned(worker.url)
            version = await self._control.weight_version(worker.url)
        if self._pool.expected_version not in (None, version):
            self._pool.keep_out(worker, version, needs_weights=self.on_returned is None)
            return
        while worker.abandoned:  # a worker that was merely slow still samples them
            await self._control.post(worker.url, "/abort_request", {"rid": worker.abandoned.pop()})
        if self._busy():  # otherwise its memory may be released
            await self._until_it_samples(worker)  # /model_info also answers when the scheduler hangs
        logger.warning("%s is back with weights %d", worker.url, version)
        self._pool.restore(worker.url)

    async def close(self) -> None:
        """Ends the checks."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
