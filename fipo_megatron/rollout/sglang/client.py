"""The rollout engine of SGLang servers, reached over HTTP: one or many, on this machine or elsewhere.

Every request gets exactly one answer. A server that dies, or stops sampling, is lost: its requests are restarted on
another one, and what it had sampled of them is discarded. A server that comes back is used again as soon as it has the
weights that the others have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from fipo_megatron.rollout.engine import EngineError, EngineMemory, Generation, GenerationRequest, WorkerHealth
from fipo_megatron.rollout.sglang.control import ControlClient
from fipo_megatron.rollout.sglang.generation import GenerationRequests
from fipo_megatron.rollout.sglang.health_watcher import HealthWatcher
from fipo_megatron.rollout.sglang.worker_pool import Worker, WorkerPool

logger = logging.getLogger(__name__)

_REACHABLE_SECONDS = 30
_LOOK_SECONDS = 1.0


class SglangClient:
    """A :class:`.engine.RolloutEngine` of SGLang servers, its workers. Create it and use it in one event loop.

    Args:
        urls: URLs of the workers.
        router: URL of a router in front of the workers, or None. Requests go there, control calls to each worker.
        context: Tokens that a prompt and its response may have together.
        vocab: Vocabulary size; a server would end with a token id that is not below it.
        api_key: Bearer token of every request.
        concurrency: Requests in flight per worker; others wait in the client.
        progress_seconds: Seconds without a new token after which a worker with requests in flight counts as lost.
            SGLang itself checks once a second, and answers without streaming in pieces of 50 tokens.
        patience_seconds: Seconds to wait for any worker to return while none is alive. Through a router: seconds
            during which a request may fail before it is given up.
        look_seconds: Seconds between two checks of the workers.
        deterministic: Whether seeds are sent, for servers with deterministic inference.

    Attributes:
        pool: The workers.
        requests: Requests to ``/generate`` of the workers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        router: str | None = None,
        context: int,
        vocab: int,
        api_key: str | None = None,
        concurrency: int = 256,
        progress_seconds: float = 300.0,
        patience_seconds: float = 600.0,
        look_seconds: float = 5.0,
        deterministic: bool = False,
    ) -> None:
        self.pool = WorkerPool(urls, router=router, concurrency=concurrency, patience_seconds=patience_seconds)
        self._control = ControlClient(api_key)
        self.requests = GenerationRequests(
            self.pool,
            self._control,
            context=context,
            vocab=vocab,
            retry_seconds=look_seconds,
            deterministic=deterministic,
        )
        self._watcher = HealthWatcher(
            self.pool,
            self._control,
            busy=lambda: bool(self.requests.in_flight),
            progress_seconds=progress_seconds,
            look_seconds=look_seconds,
        )

    @property
    def losses(self) -> int:
        """Number of times a worker was lost."""
        return self.pool.losses

    @property
    def on_returned(self) -> Callable[[str], Awaitable[None]] | None:
        """Called with the URL of a lost worker that answers with outdated weights; must send it the current ones."""
        return self._watcher.on_returned

    @on_returned.setter
    def on_returned(self, send_weights: Callable[[str], Awaitable[None]] | None) -> None:
        self._watcher.on_returned = send_weights

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response; see :meth:`.engine.RolloutEngine.generate`."""
        return await self.requests.generate(request)

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """Ends these requests, or all; see :meth:`.engine.RolloutEngine.abort`."""
        await self.requests.abort(ids)

    def worker_lost(self, url: str, because: str = "its process has ended") -> None:
        """Sends no more requests to a worker, and restarts those in flight on others."""
        self.pool.lose(url, because)

    def worker_returned(self, url: str) -> None:
        """Sends requests to a worker again; it must have the current weights."""
        self.pool.restore(url)

    def expect_version(self, version: int) -> None:
        """Sets the version of the weights that a worker which returns must have."""
        self.pool.expected_version = version

    async def reachable(self, patience_seconds: float = 0.0) -> tuple[str, ...]:
        """Returns the URLs of workers that answer now, whatever their weights; new weights are sent to these.

        A worker whose scheduler hangs, for example in a broadcast that another server has left, does not answer.

        Args:
            patience_seconds: Seconds to wait for a first worker while none answers.
        """

        async def answers(url: str) -> bool:
            try:
                async with asyncio.timeout(_REACHABLE_SECONDS):
                    await self._control.get(url, "/server_info")  # asks the scheduler; /model_info does not
            except (EngineError, TimeoutError):
                return False
            return True

        end = time.monotonic() + patience_seconds
        while True:
            found = await asyncio.gather(*map(answers, self.pool.workers))
            if any(found) or time.monotonic() >= end:
                return tuple(url for url, yes in zip(self.pool.workers, found, strict=True) if yes)
            await asyncio.sleep(_LOOK_SECONDS)

    async def control(
        self, path: str, payload: Mapping[str, Any] | None = None, *, workers: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Posts to every worker that is alive, or to the given ones, in parallel.

        Returns:
            The answer of each worker, by its URL.

        Raises:
            EngineError: a call failed, or no worker is alive; see :meth:`.control.ControlClient.post`.
        """
        urls = workers or [worker.url for worker in self.pool.alive]
        if not urls:
            raise EngineError(f"{path}: no SGLang server is alive")
        found = await asyncio.gather(*(self._control.post(url, path, payload) for url in urls))
        return dict(zip(urls, found, strict=True))

    async def look_up(self, path: str) -> dict[str, dict[str, Any]]:
        """Gets a path from every worker, by its URL; raises like :meth:`control`."""
        found = await asyncio.gather(*(self._control.get(url, path) for url in self.pool.workers))
        return dict(zip(self.pool.workers, found, strict=True))

    async def pause(self) -> None:
        """Stops sampling on all workers; see :meth:`.engine.RolloutEngine.pause`."""
        self.pool.paused = True
        await self.control("/pause_generation", {"mode": "in_place"})

    async def resume(self) -> None:
        """Continues sampling on all workers; see :meth:`.engine.RolloutEngine.resume`."""
        await self.control("/continue_generation")
        self.pool.paused, self.pool.resumed = False, time.monotonic()

    def driving(self, responses: int) -> AbstractContextManager[Callable[[int], None]]:
        """Returns a block that counts nothing: servers do not wait for their driver."""
        return contextlib.nullcontext(lambda more: None)

    def deciding(self, request_id: str) -> AbstractAsyncContextManager[None]:
        """Returns an empty block: servers do not wait for decisions."""
        return contextlib.nullcontext()

    async def release_memory(self, *what: EngineMemory) -> None:
        """Releases memory of all workers; without ``enable_memory_saver`` the servers keep it.

        Raises:
            EngineError: requests are in flight, or a call failed.
        """
        if self.requests.in_flight:
            raise EngineError("release_memory: requests are in flight; abort them or let them end")
        await self.control("/flush_cache?timeout=60")  # requests that were just aborted may take a moment to end
        await self.control("/release_memory_occupation", {"tags": list(what)})

    async def restore_memory(self, *what: EngineMemory) -> None:
        """Allocates released memory of all workers again."""
        await self.control("/resume_memory_occupation", {"tags": list(what)})

    async def weight_version(self) -> int:
        """Returns the version of the weights of all workers; see :meth:`.engine.RolloutEngine.weight_version`."""
        alive = self.pool.alive
        versions = await asyncio.gather(*(self._control.weight_version(worker.url) for worker in alive))
        if len({*versions}) != 1:
            each = ", ".join(f"{worker.url}: {version}" for worker, version in zip(alive, versions, strict=True))
            raise EngineError(f"the SGLang servers have different weights: {each or 'none is alive'}")
        return versions[0]

    async def health(self) -> tuple[WorkerHealth, ...]:
        """Returns the state of every worker."""

        async def state(worker: Worker) -> WorkerHealth:
            try:
                version: int | None = await self._control.weight_version(worker.url)
            except EngineError:
                version = None
            return WorkerHealth(worker.url, worker.alive and version is not None, version, len(worker.tasks))

        return tuple(await asyncio.gather(*map(state, self.pool.workers.values())))

    async def close(self) -> None:
        """Aborts the requests in flight and closes the connections; the servers keep running."""
        await self._watcher.close()
        try:
            await self.abort()
        except EngineError as error:
            logger.warning("%s", error)
        await self._control.close()
