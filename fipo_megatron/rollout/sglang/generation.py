"""Requests to ``/generate`` of SGLang servers: each gets exactly one answer, whatever happens to servers meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import aiohttp
import numpy as np
from numpy.typing import NDArray

from fipo_megatron.rollout.engine import (
    EngineError,
    Generation,
    GenerationRequest,
    PermanentEngineError,
    RequestError,
    SamplingParameters,
    check_request,
    check_tokens,
)
from fipo_megatron.rollout.sglang.control import UNAUTHORISED, ControlClient
from fipo_megatron.rollout.sglang.responses import MalformedAnswerError, error_text, parse_generation, parse_log_probs
from fipo_megatron.rollout.sglang.worker_pool import Worker, WorkerPool

_ABORT_AGAIN_SECONDS = 0.05
T = TypeVar("T")


class _WorkerLostError(Exception):
    """The request must be restarted on another worker."""


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request to ``/generate``.

    Attributes:
        id: Unique among the requests in flight.
        group: Name of the group.
        payload: Body without ``rid``.
        parse: Parses the answer; raises MalformedAnswerError.
    """

    id: str
    group: str
    payload: Mapping[str, Any]
    parse: Callable[[bytes], T]


class GenerationRequests:
    """Sends requests to the workers of a pool. A request whose worker is lost is restarted from its beginning.

    Args:
        pool: The workers.
        control: Client for the requests.
        context: Tokens that a prompt and its response may have together.
        vocab: Vocabulary size; a server would end with a token id that is not below it.
        retry_seconds: Most seconds between two attempts through a router.
        deterministic: Whether seeds are sent, for servers with deterministic inference.

    Attributes:
        in_flight: Id of the current attempt of each request that has not ended; empty before its first attempt.
    """

    def __init__(
        self,
        pool: WorkerPool,
        control: ControlClient,
        *,
        context: int,
        vocab: int,
        retry_seconds: float,
        deterministic: bool,
    ) -> None:
        self._pool, self._control = pool, control
        self._context, self._vocab, self._deterministic = context, vocab, deterministic
        self._retry_seconds = min(1.0, retry_seconds)
        self.in_flight: dict[str, str] = {}
        self._aborted: set[str] = set()
        self._attempts = 0
        self._parsing = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response; see :meth:`.engine.RolloutEngine.generate`."""
        check_request(request, self._context, self._vocab)
        payload = {
            "input_ids": request.tokens.tolist(),
            "return_logprob": True,
            "sampling_params": self._sampling_fields(request),
        }
        found = await self._serve(_Call(request.id, request.group, payload, parse_generation))
        return _nothing_sampled() if found is None else found

    async def log_probs(
        self, request_id: str, group: str, tokens: NDArray[np.int32], start: int
    ) -> NDArray[np.float32]:
        """Returns the log-probs of given tokens at temperature 1; nothing is sampled.

        Args:
            request_id: Id of the request, unique among those in flight.
            group: Name of the group; see :class:`.engine.GenerationRequest`.
            tokens: ``[T]``: a sequence.
            start: Number of its first tokens whose log-probs are not returned, at least 1.

        Returns:
            ``[T - start]`` float32.

        Raises:
            RequestError: the sequence does not fit the model.
            EngineError: the servers cannot continue, or log-probs are not finite.
        """
        check_tokens(request_id, tokens, 0, self._context, self._vocab)
        payload = {
            "input_ids": tokens.tolist(),
            "return_logprob": True,
            "logprob_start_len": start - 1,  # the first one is always null
            "sampling_params": {"max_new_tokens": 0},
        }
        call = _Call(request_id, group, payload, lambda body: parse_log_probs(body, len(tokens) - start))
        found = await self._serve(call)
        if found is None:
            raise EngineError(f"request {request_id}: was aborted")
        if not np.isfinite(found).all():
            raise PermanentEngineError(f"request {request_id}: the log-probs of its tokens are not all finite")
        return found

    async def _serve(self, request: _Call[T]) -> T | None:
        """Returns the answer to a request; None if it was aborted before its first attempt."""
        self.in_flight[request.id] = ""
        worker: Worker | None = None
        failing_since = time.monotonic()
        try:
            while True:
                worker = await self._pool.assign(request.group, worker)
                async with worker.slots:
                    if request.id in self._aborted:
                        return None
                    if not worker.alive:
                        continue
                    began = time.monotonic()
                    try:
                        return await self._attempt(worker, request)
                    except _WorkerLostError as error:
                        lost = error
                if worker is not self._pool.router:
                    self._pool.lose(worker.url, str(lost))
                    continue
                if time.monotonic() - began > self._pool.patience_seconds:
                    failing_since = time.monotonic()
                await self._wait_for_router(worker, request, lost, failing_since)
        finally:
            del self.in_flight[request.id]
            self._aborted.discard(request.id)
            self._pool.release(request.group)

    async def _wait_for_router(
        self, router: Worker, request: _Call[Any], lost: _WorkerLostError, failing_since: float
    ) -> None:
        """Waits before a request is sent through the router again, which may take a dead worker for alive.

        Raises:
            EngineError: the request has failed for longer than the pool's patience.
        """
        patience = self._pool.patience_seconds
        if time.monotonic() - failing_since > patience:
            raise EngineError(
                f"the router {router.url} did not serve request {request.id} within {patience:g} s: {lost}"
            )
        await asyncio.sleep(self._retry_seconds)

    async def _attempt(self, worker: Worker, request: _Call[T]) -> T:
        """Sends a request once; ends at once if the worker is lost."""
        self._attempts += 1
        attempt = self.in_flight[request.id] = f"{request.id}~{self._attempts}"
        task: asyncio.Task[T] = asyncio.create_task(self._post(worker, request, attempt))
        worker.tasks[request.id] = task
        try:
            await asyncio.wait({task})
        finally:
            worker.tasks.pop(request.id, None)
            if not task.done():
                task.cancel()
        if task.cancelled():
            worker.abandoned.add(attempt)
            raise _WorkerLostError(worker.lost_because)
        return task.result()

    async def _post(self, worker: Worker, request: _Call[T], attempt: str) -> T:
        # The id of an attempt, not of the request: a server may still sample an earlier attempt.
        payload = {"rid": attempt, **request.payload}
        try:
            status, body = await self._control.exchange(worker.url + "/generate", payload)
        except (aiohttp.ClientError, OSError) as error:
            raise _WorkerLostError(f"{type(error).__name__}: {error}") from error
        if status in UNAUTHORISED:
            raise EngineError(f"{worker.url}: unauthorised: give the server's API key")
        if 400 <= status < 500:
            raise RequestError(f"request {request.id}: {worker.url} refused it: {error_text(body)}")
        if status != 200:
            raise _WorkerLostError(f"HTTP status {status}: {error_text(body)}")
        try:
            async with self._parsing:
                await asyncio.sleep(0)  # many answers come at once; other tasks run between two of them
                return request.parse(body)
        except MalformedAnswerError as error:
            raise _WorkerLostError(str(error)) from error

    def _sampling_fields(self, request: GenerationRequest) -> dict[str, Any]:
        fields = sampling_fields(request.sampling)
        if self._deterministic:
            fields["sampling_seed"] = request.seed % (1 << 31)
        return fields

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """Ends these requests, or all; see :meth:`.engine.RolloutEngine.abort`."""
        wanted = {*self.in_flight} if ids is None else self.in_flight.keys() & {*ids}
        self._aborted |= wanted
        # A server ignores the abort of a request that reaches it later, so it is repeated until all have ended.
        while calls := [
            self._control.post(worker.url, "/abort_request", {"rid": self.in_flight[id_]})
            for worker in self._pool.alive
            for id_ in wanted & (self._pool.router or worker).tasks.keys()
        ]:
            await asyncio.gather(*calls)
            if self._pool.paused:
                return
            await asyncio.sleep(_ABORT_AGAIN_SECONDS)


def _nothing_sampled() -> Generation:
    """Returns the result of a request that was aborted before its first attempt."""
    return Generation(np.empty(0, np.int32), np.empty(0, np.float32), (), "abort")


def sampling_fields(sampling: SamplingParameters) -> dict[str, Any]:
    """Returns ``sampling_params`` of SGLang's ``/generate``.

    Every field that changes the distribution is given: a server's ``preferred_sampling_params`` fills in those that a
    request leaves out, and the log-probs that it returns do not show a filter.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "min_new_tokens": 0,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        # SGLang would ignore the given stop tokens, too; with them it also stops at the model's own.
        "ignore_eos": not sampling.stop_token_ids,
    }
