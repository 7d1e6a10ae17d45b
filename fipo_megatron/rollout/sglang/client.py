"""The engine as SGLang servers, reached over HTTP: one or many, somewhere.

Every request gets exactly one answer. A server that dies, or makes no progress, is left out; its requests start again
on another one, from their beginning, and what it had sampled of them is gone. A server that comes back is used again as
soon as it has the weights that the others have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import orjson

from fipo_megatron.rollout.engine import (
    EngineError,
    EngineMemory,
    Generation,
    GenerationRequest,
    RequestError,
    WorkerHealth,
)
from fipo_megatron.rollout.sglang.responses import MalformedAnswerError, error_text, parse_generation

logger = logging.getLogger(__name__)

_UNAUTHORISED = (401, 403)
_NOTHING_SAMPLED = 503
"""What ``/health_generate`` of SGLang 0.5.23 says after 20 seconds without a token, and while it starts or ends."""


class _WorkerLostError(Exception):
    """The request has to start again elsewhere."""


@dataclass(eq=False)
class _Worker:
    url: str
    slots: asyncio.Semaphore
    alive: bool = True
    lost_because: str = ""
    needs_weights: bool = False
    tasks: dict[str, asyncio.Task[Generation]] = field(default_factory=dict)
    groups: int = 0
    left: set[str] = field(default_factory=set)
    """Attempts that it may still be at, and nobody waits for."""


class SglangClient:
    """A :class:`.engine.RolloutEngine` of SGLang servers. Make it, and use it, in one event loop.

    Args:
        urls: Of the workers.
        router: Where requests go instead, in front of the workers; control calls go to each of them.
        context: Tokens that a prompt and its response may have.
        vocab: Token ids are below; a larger one would end the server.
        api_key: Sent as a bearer token.
        concurrency: Requests in flight per worker; others wait here.
        progress_seconds: A worker with requests in flight that samples nothing for so long is lost. SGLang itself looks
            once a second, and sends what does not stream in pieces of 50 tokens.
        patience_seconds: With no worker left, wait so long for one to come back.
        look_seconds: Between two looks at the workers.
        deterministic: Send seeds: for servers with deterministic inference.
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
        self.context, self.vocab = context, vocab
        self.on_returned: Callable[[str], Awaitable[None]] | None = None
        """Called with the URL of a worker that answers again with other weights; sends it the current ones."""
        self._workers = {url: _Worker(url, asyncio.Semaphore(concurrency)) for url in urls}
        self._router = _Worker(router, asyncio.Semaphore(concurrency * len(urls))) if router else None
        self._progress, self._patience, self._look = progress_seconds, patience_seconds, look_seconds
        self._deterministic = deterministic
        self._expected: int | None = None
        self._paused = False
        self._resumed = -math.inf
        self.losses = 0
        """How often a worker was lost."""
        self._in_flight: dict[str, str] = {}
        self._attempts = 0
        self._parsing = asyncio.Lock()
        self._aborted: set[str] = set()
        self._groups: dict[str, tuple[_Worker, int]] = {}
        self._somebody = asyncio.Event()
        self._somebody.set()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),  # servers hang up after 5 s
            read_bufsize=1 << 20,
        )
        self._watcher = asyncio.create_task(self._watch())

    @property
    def workers(self) -> tuple[str, ...]:
        """URLs of all workers."""
        return tuple(self._workers)

    async def generate(self, request: GenerationRequest) -> Generation:
        """See :class:`.engine.RolloutEngine`."""
        self._check(request)
        self._in_flight[request.id] = ""
        worker: _Worker | None = None
        failing_since = time.monotonic()
        try:
            while True:
                worker = await self._worker_of(request.group, worker)
                async with worker.slots:
                    if request.id in self._aborted:
                        return _nothing()
                    if not worker.alive:
                        continue
                    began = time.monotonic()
                    try:
                        return await self._ask(worker, request)
                    except _WorkerLostError as error:
                        lost = error
                if worker is not self._router:
                    self.worker_lost(worker.url, str(lost))
                    continue
                if time.monotonic() - began > self._patience:
                    failing_since = time.monotonic()
                await self._after_failure(request, lost, failing_since)
        finally:
            del self._in_flight[request.id]
            self._aborted.discard(request.id)
            self._leave(request.group)

    def _check(self, request: GenerationRequest) -> None:
        length, more = len(request.tokens), request.sampling.max_tokens
        if not length or length + more > self.context:
            raise RequestError(
                f"request {request.id}: {length} tokens and max_tokens = {more} do not fit into the model's context "
                f"of {self.context}"
            )
        if int(request.tokens.min()) < 0 or (largest := int(request.tokens.max())) >= self.vocab:
            raise RequestError(f"request {request.id}: token {largest} is not in the vocabulary of {self.vocab}")

    async def _worker_of(self, group: str, last: _Worker | None) -> _Worker:
        """The worker of a group, which it keeps while it lives; ``last`` if this request belongs to the group already.

        Raises:
            EngineError: no worker came back in time, or one did that needs weights, and nobody here can send them.
        """
        end = time.monotonic() + self._patience
        while not any(worker.alive for worker in self._workers.values()):
            self._somebody.clear()
            if any(worker.needs_weights for worker in self._workers.values()):
                raise EngineError(self._nobody())
            try:
                await asyncio.wait_for(self._somebody.wait(), end - time.monotonic())
            except TimeoutError:
                raise EngineError(self._nobody()) from None
        worker, count = (self._router, 0) if self._router else self._groups.get(group, (None, 0))
        if worker is None or not worker.alive:
            alive = [worker for worker in self._workers.values() if worker.alive]
            worker = min(alive, key=lambda one: one.groups)
        if worker is self._router:
            return worker
        self._leave_worker(group)
        worker.groups += 1
        self._groups[group] = worker, count + (last is None)
        return worker

    async def _after_failure(self, request: GenerationRequest, lost: _WorkerLostError, failing_since: float) -> None:
        """Of a request through the router, which may take a dead worker for alive: others are left alone.

        Raises:
            EngineError: it has failed for too long.
        """
        assert self._router is not None
        if time.monotonic() - failing_since > self._patience:
            raise EngineError(
                f"the router {self._router.url} did not serve request {request.id} within {self._patience:g} s: {lost}"
            )
        await asyncio.sleep(min(1.0, self._look))

    def _leave_worker(self, group: str) -> None:
        if group in self._groups:
            self._groups[group][0].groups -= 1

    def _leave(self, group: str) -> None:
        """A request of the group has ended."""
        if group not in self._groups:
            return
        worker, count = self._groups[group]
        if count > 1:
            self._groups[group] = worker, count - 1
        else:
            self._leave_worker(group)
            del self._groups[group]

    def _nobody(self) -> str:
        lines = [f"{worker.url}: {worker.lost_because}" for worker in self._workers.values()]
        return f"no SGLang server has come back within {self._patience:g} s:\n" + "\n".join(lines)

    async def _ask(self, worker: _Worker, request: GenerationRequest) -> Generation:
        """One attempt, which ends at once where the worker is lost."""
        self._attempts += 1
        attempt = self._in_flight[request.id] = f"{request.id}~{self._attempts}"
        task = worker.tasks[request.id] = asyncio.create_task(self._post(worker, request))
        try:
            await asyncio.wait({task})
        finally:
            worker.tasks.pop(request.id, None)
            if not task.done():
                task.cancel()
        if task.cancelled():
            worker.left.add(attempt)
            raise _WorkerLostError(worker.lost_because)
        return task.result()

    async def _post(self, worker: _Worker, request: GenerationRequest) -> Generation:
        sampling = request.sampling
        payload: dict[str, Any] = {
            "rid": self._in_flight[request.id],  # a server may still have an earlier attempt
            "input_ids": request.tokens.tolist(),
            "return_logprob": True,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
                # It would ignore these, too; with them it also stops at the model's own end-of-sequence tokens.
                "ignore_eos": not sampling.stop_token_ids,
            },
        }
        if self._deterministic:
            payload["sampling_params"]["sampling_seed"] = request.seed % (1 << 31)
        try:
            status, body = await self._exchange(worker.url + "/generate", payload)
        except (aiohttp.ClientError, OSError) as error:
            raise _WorkerLostError(f"{type(error).__name__}: {error}") from error
        if status in _UNAUTHORISED:
            raise EngineError(f"{worker.url}: unauthorised: give the server's API key")
        if 400 <= status < 500:
            raise RequestError(f"request {request.id}: {worker.url} refused it: {error_text(body)}")
        if status != 200:
            raise _WorkerLostError(f"HTTP status {status}: {error_text(body)}")
        try:
            async with self._parsing:
                await asyncio.sleep(0)  # many come at a time; others get their turn between two
                return parse_generation(body)
        except MalformedAnswerError as error:
            raise _WorkerLostError(str(error)) from error

    async def _exchange(self, url: str, payload: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Status and body; GET without a payload."""
        if payload is None:
            async with self._session.get(url) as answer:
                return answer.status, await answer.read()
        data, headers = orjson.dumps(payload), {"Content-Type": "application/json"}
        async with self._session.post(url, data=data, headers=headers) as answer:
            return answer.status, await answer.read()

    def worker_lost(self, url: str, because: str = "its process has ended") -> None:
        """Leaves a worker out, and starts its requests again on others."""
        worker = self._workers[url]
        if worker.alive:
            logger.warning("lost %s: %s; %d requests start again", url, because, len(worker.tasks))
            self.losses += 1
        worker.alive, worker.lost_because = False, because
        for task in worker.tasks.values():
            task.cancel()

    def worker_returned(self, url: str) -> None:
        """Uses a worker again; it has the current weights."""
        self._workers[url].alive, self._workers[url].needs_weights = True, False
        self._somebody.set()

    def expect_version(self, version: int) -> None:
        """Only workers with these weights are used from now on."""
        self._expected = version

    async def _watch(self) -> None:
        """Looks at every worker from time to time."""
        while True:
            await asyncio.sleep(self._look)
            await asyncio.gather(*(self._look_at(worker) for worker in self._workers.values()))

    async def _look_at(self, worker: _Worker) -> None:
        try:
            if not worker.alive:
                await self._try_again(worker)
            elif (worker.tasks or (self._router and self._in_flight)) and not self._paused:
                await self._until_it_samples(worker)
        except TimeoutError:
            if not self._paused and time.monotonic() - self._resumed > self._progress:
                self.worker_lost(worker.url, f"no progress for {self._progress:g} s")
        except (aiohttp.ClientError, OSError, EngineError) as error:
            if worker.alive:
                self.worker_lost(worker.url, f"{type(error).__name__}: {error}")

    async def _until_it_samples(self, worker: _Worker) -> None:
        """Returns as soon as anything is sampled; an idle server samples one token for this.

        Raises:
            EngineError: it answers with an error.
            TimeoutError: nothing was sampled for too long.
        """
        async with asyncio.timeout(self._progress):
            while not self._paused:
                status, body = await self._exchange(worker.url + "/health_generate", None)
                if status == 200:
                    return
                if status != _NOTHING_SAMPLED:
                    raise EngineError(f"/health_generate: HTTP status {status}: {error_text(body)}")
                await asyncio.sleep(self._look)

    async def _try_again(self, worker: _Worker) -> None:
        """A worker that answers and has the current weights is used again."""
        async with asyncio.timeout(10):
            version = await self._version_of(worker)
        if self._expected is not None and version != self._expected and self.on_returned is not None:
            await self.on_returned(worker.url)
            version = await self._version_of(worker)
        if self._expected in (None, version):
            while worker.left:  # one that only was slow
                await self._ask_one(worker.url, "/abort_request", {"rid": worker.left.pop()})
            if self._in_flight:  # else its memory may be released
                await self._until_it_samples(worker)  # a scheduler that hangs leaves /model_info as it was
            logger.warning("%s is back with weights %d", worker.url, version)
            self.worker_returned(worker.url)
        else:
            worker.lost_because = f"is back with weights {version}, current are {self._expected}"
            worker.needs_weights = self.on_returned is None
            self._somebody.set()

    async def _version_of(self, worker: _Worker) -> int:
        answer = await self._ask_one(worker.url, "/model_info", None)
        return int(answer["weight_version"])

    async def reachable(self) -> tuple[str, ...]:
        """Workers that answer now, whatever their weights: those to send new ones to."""

        async def answers(url: str) -> bool:
            try:
                async with asyncio.timeout(30):
                    await self._version_of(self._workers[url])
            except (EngineError, TimeoutError):
                return False
            return True

        found = await asyncio.gather(*map(answers, self._workers))
        return tuple(url for url, yes in zip(self._workers, found, strict=True) if yes)

    async def control(
        self, path: str, payload: Mapping[str, Any] | None = None, *, workers: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Posts to every worker that is alive, or to these, all at a time.

        Returns:
            What each answered, by its URL.

        Raises:
            EngineError: any of them failed; the message names worker, path, status and what it said.
        """
        urls = workers or [worker.url for worker in self._workers.values() if worker.alive]
        if not urls:
            raise EngineError(f"{path}: no SGLang server is alive")
        found = await asyncio.gather(*(self._ask_one(url, path, payload or {}) for url in urls))
        return dict(zip(urls, found, strict=True))

    async def look_up(self, path: str) -> dict[str, dict[str, Any]]:
        """Gets from every worker, by its URL; raises like :meth:`control`."""
        found = await asyncio.gather(*(self._ask_one(url, path, None) for url in self._workers))
        return dict(zip(self._workers, found, strict=True))

    async def _ask_one(self, url: str, path: str, payload: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            status, body = await self._exchange(url + path, payload)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{url}{path}: cannot be reached: {type(error).__name__}: {error}") from error
        if status in _UNAUTHORISED:
            raise EngineError(f"{url}{path}: unauthorised: give the server's API key")
        if status != 200:
            raise EngineError(f"{url}{path}: HTTP status {status}: {error_text(body)}")
        try:
            answer = orjson.loads(body) if body else {}
        except ValueError:
            answer = body.decode(errors="replace")
        answer = answer if isinstance(answer, dict) else {"answer": answer}
        if answer.get("success") is False:
            raise EngineError(f"{url}{path}: {answer.get('message') or answer.get('error_message') or answer}")
        return answer

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """See :class:`.engine.RolloutEngine`."""
        wanted = {*self._in_flight} if ids is None else self._in_flight.keys() & {*ids}
        self._aborted |= wanted
        # A server forgets to abort what reaches it later than the call, so that it has to be told again.
        while calls := [
            self._ask_one(worker.url, "/abort_request", {"rid": self._in_flight[id_]})
            for worker in self._workers.values()
            for id_ in wanted & (self._router or worker).tasks.keys()
            if worker.alive
        ]:
            await asyncio.gather(*calls)
            if self._paused:
                return
            await asyncio.sleep(0.05)

    async def pause(self) -> None:
        """See :class:`.engine.RolloutEngine`."""
        self._paused = True
        await self.control("/pause_generation", {"mode": "in_place"})

    async def resume(self) -> None:
        """See :class:`.engine.RolloutEngine`."""
        await self.control("/continue_generation")
        self._paused, self._resumed = False, time.monotonic()

    def deciding(self) -> AbstractAsyncContextManager[None]:
        """See :class:`.engine.RolloutEngine`: servers do not wait."""
        return contextlib.nullcontext()

    async def release_memory(self, *what: EngineMemory) -> None:
        """See :class:`.engine.RolloutEngine`; needs ``enable_memory_saver`` to have an effect."""
        if self._in_flight:
            raise EngineError("release_memory: requests are in flight; abort them or let them end")
        await self.control("/flush_cache?timeout=60")  # for what was aborted a moment ago
        await self.control("/release_memory_occupation", {"tags": list(what)})

    async def restore_memory(self, *what: EngineMemory) -> None:
        """See :class:`.engine.RolloutEngine`."""
        await self.control("/resume_memory_occupation", {"tags": list(what)})

    async def weight_version(self) -> int:
        """See :class:`.engine.RolloutEngine`."""
        alive = [worker for worker in self._workers.values() if worker.alive]
        versions = await asyncio.gather(*(self._version_of(worker) for worker in alive))
        if len({*versions}) != 1:
            each = ", ".join(f"{worker.url}: {version}" for worker, version in zip(alive, versions, strict=True))
            raise EngineError(f"the SGLang servers have different weights: {each or 'none is alive'}")
        return versions[0]

    async def health(self) -> tuple[WorkerHealth, ...]:
        """See :class:`.engine.RolloutEngine`."""

        async def of(worker: _Worker) -> WorkerHealth:
            try:
                version: int | None = await self._version_of(worker)
            except EngineError:
                version = None
            return WorkerHealth(worker.url, worker.alive and version is not None, version, len(worker.tasks))

        return tuple(await asyncio.gather(*map(of, self._workers.values())))

    async def close(self) -> None:
        """Ends the requests in flight and the connections; the servers are somebody else's."""
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        try:
            await self.abort()
        except EngineError as error:
            logger.warning("%s", error)
        await self._session.close()


def _nothing() -> Generation:
    """Of a request that was aborted before it began."""
    return Generation(np.empty(0, np.int32), np.empty(0, np.float32), (), "abort")
