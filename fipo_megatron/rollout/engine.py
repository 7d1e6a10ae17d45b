"""What samples responses: the protocol of rollout engines, requests to them and what they return.

Token ids go in and come out; text is nobody's business here. All log-probs are after temperature and before nucleus
filtering: ``log_softmax(logits / temperature)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import FinishReason, TokenSpan

EngineMemory = Literal["kv_cache", "weights"]


class EngineError(RuntimeError):
    """The engine cannot go on; the message says why and what to do."""


class RequestError(ValueError):
    """This request can never be served: trying it again, or elsewhere, does not help."""


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are drawn.

    Attributes:
        temperature: Logits are divided by it.
        max_tokens: Generation stops after so many new tokens.
        top_p: Nucleus; 1: off.
        stop_token_ids: Generation stops with one of these, which is part of the response.
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
    """A response, or the rest of one, to be sampled.

    Attributes:
        id: Unique among the requests in flight.
        group: Requests of one group go to one worker, which has then read their prompt once.
        tokens: ``[P]`` int32: the prompt, and what there is of the response already.
        sampling: How to sample.
        seed: See :func:`sampling_seed`. The embedded engine is bound to it; SGLang only with deterministic inference.
    """

    id: str
    group: str
    tokens: NDArray[np.int32]
    sampling: SamplingParameters
    seed: int


@dataclass(frozen=True, eq=False)
class Generation:
    """What was sampled.

    Attributes:
        tokens: ``[R]`` int32, new ones only; empty where a request was aborted before its first.
        log_probs: ``[R]`` float32, of ``tokens``.
        spans: Which weights sampled what, from 0 on; empty without tokens.
        finish_reason: ``stop``, ``length`` or ``abort``.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    spans: tuple[TokenSpan, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class WorkerHealth:
    """How a worker is.

    Attributes:
        name: Its URL, or ``embedded``.
        alive: Whether it answers.
        weight_version: Of its weights; None where it does not answer.
        running: Requests in flight.
    """

    name: str
    alive: bool
    weight_version: int | None
    running: int


def sampling_seed(run_seed: int, prompt_id: str, sample: int, span: int) -> int:
    """A seed that depends on what is sampled alone, not on when or beside what: 63 bits of a BLAKE2 hash.

    Args:
        run_seed: ``seed`` of the configuration.
        prompt_id: ``Prompt.id``.
        sample: Number of the response among those to its prompt.
        span: How many times the response was interrupted before.
    """
    text = f"{run_seed}/{sample}/{span}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def spans_of(versions: Sequence[int]) -> tuple[TokenSpan, ...]:
    """Runs of equal weight versions of consecutive tokens."""
    starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    return tuple(TokenSpan(start, versions[start]) for start in starts)


class RolloutEngine(Protocol):
    """Samples responses, many at a time; all calls from one event loop."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response.

        Raises:
            RequestError: it can never be served: longer than the model's context, for example.
            EngineError: the engine cannot go on.
        """

    async def abort(self, ids: Collection[str] | None = None) -> None:
        """Ends these requests, or all: each returns what it has, with finish reason ``abort``."""

    async def pause(self) -> None:
        """No token is sampled any more until :meth:`resume`; requests in flight stay where they are."""

    async def resume(self) -> None:
        """Goes on; after an update of the weights, with the new ones."""

    async def release_memory(self, *what: EngineMemory) -> None:
        """Gives memory back; the engine must be idle. Released weights are gone: restore and update them."""

    async def restore_memory(self, *what: EngineMemory) -> None:
        """Takes it again."""

    def deciding(self) -> AbstractAsyncContextManager[None]:
        """A block whose outcome decides what is sampled next.

        An engine whose results may not depend on time waits for all such blocks, and ends them in the order in which
        they began.
        """

    async def weight_version(self) -> int:
        """Of all workers.

        Raises:
            EngineError: they differ, or one does not answer.
        """

    async def health(self) -> tuple[WorkerHealth, ...]:
        """Of every worker."""

    async def close(self) -> None:
        """Ends everything that the engine has started."""
