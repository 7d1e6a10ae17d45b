"""The protocol of rollout engines, the requests that they take and the results that they return.

Engines take and return token ids, not text. All log-probs are after temperature and before nucleus filtering:
``log_softmax(logits / temperature)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import FinishReason, TokenSpan

EngineMemory = Literal["kv_cache", "weights", "cuda_graph"]


class EngineError(RuntimeError):
    """The engine cannot continue; the message gives the reason and what to do."""


class PermanentEngineError(EngineError):
    """An error that the same weights and requests cause again, such as log-probs that are not finite."""


class LostRankError(RuntimeError):
    """A rank has sent no heartbeat. No collective can be made any more, so the run ends and saves nothing."""


class RequestError(ValueError):
    """A request that no worker can serve; sending it again does not help."""


@dataclass(frozen=True)
class SamplingParameters:
    """The parameters with which tokens are drawn.

    Attributes:
        temperature: Divisor of the logits.
        max_tokens: Most new tokens.
        top_p: Probability of the nucleus from which tokens are drawn; 1 turns it off.
        stop_token_ids: Tokens that end the response; the one that ends it is part of it.
    """

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises RequestError that names the field."""
        for name, good, valid in (
            ("temperature", self.temperature > 0, "above 0"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise RequestError(f"{name} = {getattr(self, name)}: must be {valid}")


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """A request for a response, or for the rest of one.

    Attributes:
        id: Unique among the requests in flight.
        group: Name of the group. All requests of a group are sent to one worker, which reads their prompt once.
        tokens: ``[P]`` int32: the prompt, and the tokens of the response so far.
        sampling: Sampling parameters.
        seed: Seed of :func:`sampling_seed`. SGLang uses it with deterministic inference only.
    """

    id: str
    group: str
    tokens: NDArray[np.int32]
    sampling: SamplingParameters
    seed: int


def _none() -> NDArray[np.bool_]:
    return np.empty(0, np.bool_)


@dataclass(frozen=True, eq=False)
class Generation:
    """The result of a request.

    Attributes:
        tokens: ``[R]`` int32, the new tokens; empty if the request was aborted before its first token.
        log_probs: ``[R]`` float32, log-probs of ``tokens``.
        spans: Weight versions of ``tokens``; the first span starts at 0. Empty without tokens.
        finish_reason: ``stop``, ``length`` or ``abort``.
        selected: ``[R]`` bool: tokens for which a rule departed from the primary of two models; all false, or
            empty, with one.
        changed: ``[R]`` bool: selected tokens that the primary model would not have drawn.
        quantities: ``[R, Q]`` float64: quantities by which the rule selects, or entropies that the embedded engine was
            asked for; None if there are none.
        retractions: Times that the engine discarded the KV cache of the request for lack of room, and read it again.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    spans: tuple[TokenSpan, ...]
    finish_reason: FinishReason
    selected: NDArray[np.bool_] = field(default_factory=_none)
    changed: NDArray[np.bool_] = field(default_factory=_none)
    quantities: NDArray[np.float64] | None = None
    retractions: int = 0


@dataclass(frozen=True)
class WorkerHealth:
    """The state of a worker.

    Attributes:
        name: URL of a server, or ``embedded``.
        alive: Whether it answers and is used.
        weight_version: Version of its weights; None if it does not answer.
        running: Number of requests in flight.
    """

    name: str
    alive: bool
    weight_version: int | None
    running: int


def sampling_seed(run_seed: int, prompt_id: str, sample: int, span: int) -> int:
    """Returns a seed that identifies a span of a response: 63 bits of a BLAKE2 hash of the arguments.

    Args:
        run_seed: ``seed`` of the configuration.
        prompt_id: ``Prompt.id``.
        sample: Number of the response among those to its prompt.
        span: Number of interruptions of the response so far.
    """
    text = f"{run_seed}/{sample}/{span}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def check_request(request: GenerationRequest, context: int, vocab: int) -> None:
    """Checks that a request fits a model.

    Args:
        request: Request to check.
        context: Tokens that a prompt and its response may have together.
        vocab: Vocabulary size.

    Raises:
        RequestError: the request has no tokens, is too long, or has a token id outside the vocabulary.
    """
    check_tokens(request.id, request.tokens, request.sampling.max_tokens, context, vocab)


def check_tokens(request_id: str, tokens: NDArray[np.int32], more: int, context: int, vocab: int) -> None:
    """Checks that given tokens and ``more`` new ones fit a model; raises like :func:`check_request`."""
    if not len(tokens):
        raise RequestError(f"request {request_id}: has no tokens")
    if len(tokens) + more > context:
        raise RequestError(
            f"request {request_id}: {len(tokens)} tokens and max_tokens = {more} do not fit into the model's context "
            f"of {context}"
        )
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest >= vocab:
        token = smallest if smallest < 0 else largest
        raise RequestError(f"request {request_id}: token {token} is not in the model's vocabulary of {vocab}")


class ResponseEngine(Protocol):
    """Samples responses to many requests at the same time. All calls are made from one event loop."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response.

        Raises:
            RequestError: the request can never be served; it is longer than the model's context, for example.
            EngineError: the engine cannot continue.
        """


class RolloutEngine(ResponseEngine, Protocol):
    """A :class:`ResponseEngine` whose sampling can be ended and paused, and whose weights can be replaced."""

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """Ends the requests with these ids, or all. Each returns the tokens sampled so far, with reason ``abort``."""

    async def pause(self) -> None:
        """Stops sampling until :meth:`resume`. Requests stay in flight."""

    async def resume(self) -> None:
        """Continues sampling; after an update of the weights, with the new ones."""

    async def release_memory(self, *what: EngineMemory) -> None:
        """Frees memory; the engine must be idle. Released weights are lost: restore and update them before sampling."""

    async def restore_memory(self, *what: EngineMemory) -> None:
        """Allocates released memory again."""

    def driving(self, responses: int) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a block in which the caller drives the engine: requests this many responses and decides on each.

        An engine whose results must not depend on time takes turns with its driver. It samples only while every
        response is either requested or given up at the end of its :meth:`deciding` block. Other engines do not wait.

        Args:
            responses: Number of responses that the caller will request and decide on.

        Returns:
            A context manager that yields a function. The caller calls it with a number of further responses, within a
            :meth:`deciding` block, before it requests them.
        """

    def deciding(self, request_id: str) -> AbstractAsyncContextManager[None]:
        """Opens a block in which the driver decides what follows from a response, and then gives it up.

        Every response of a :meth:`driving` block needs one such block. Within it, :meth:`abort` may be called. An
        engine whose results must not depend on time opens the blocks of finished responses in the order in which it
        returned them.

        Args:
            request_id: ``GenerationRequest.id`` of the last request of the response.
        """

    async def weight_version(self) -> int:
        """Returns the version of the weights of all workers.

        Raises:
            EngineError: the versions differ, or a worker does not answer.
        """

    async def health(self) -> tuple[WorkerHealth, ...]:
        """Returns the state of every worker."""

    async def close(self) -> None:
        """Ends the requests in flight and everything that the engine has started."""
