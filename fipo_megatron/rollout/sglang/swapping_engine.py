"""Replaces tokens of one model by those of another one, with SGLang servers: draft, score, cut.

A server holds one model, so :class:`.embedded.drawing.Swap` by ``delta`` is applied to blocks of tokens. The primary
model drafts a block, and the second model returns the log-probs of the same tokens. The draft is cut at the first token
with Δ = log π_second − log π_primary below the threshold. The second model draws this one token, and the next draft
begins after it.

The distribution is exact for every length of the drafts: whether a token is replaced depends on this token and those
before it, and the tokens after a cut, which are discarded, have decided nothing. The probability of a token y is
π_primary(y)·1[Δ(y) ≥ τ] + P_primary(Δ < τ)·π_second(y), given the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.rollout.engine import Generation, GenerationRequest, ResponseEngine, sampling_seed

Floats = NDArray[np.float64]


class ScoringEngine(ResponseEngine, Protocol):
    """A :class:`.engine.ResponseEngine` that returns the log-probs of given tokens."""

    async def log_probs(
        self, request_id: str, group: str, tokens: NDArray[np.int32], start: int
    ) -> NDArray[np.float32]:
        """Returns log-probs of ``tokens[start:]`` at temperature 1; see :meth:`.generation.GenerationRequests`."""


@dataclass
class SwappingEngine:
    """A :class:`.engine.ResponseEngine` of two models.

    Requests must have temperature 1, because log-probs of given tokens do.

    Attributes:
        primary: Servers of the model that drafts.
        second: Servers of the model that scores and replaces.
        draft_tokens: Most tokens of a draft.
        threshold: Tokens with Δ below it are replaced; None replaces none, and drafts are whole responses.
    """

    primary: ResponseEngine
    second: ScoringEngine
    draft_tokens: int
    threshold: float | None = None

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response. ``quantities`` has Δ of the primary model's token at each position, ``[R, 1]``."""
        parts = [await self._block(request)]
        while parts[-1].finish_reason == "length":
            done = np.concatenate([part.tokens for part in parts])
            left = request.sampling.max_tokens - len(done)
            if not left:
                break
            tokens, sampling = np.concatenate([request.tokens, done]), replace(request.sampling, max_tokens=left)
            parts.append(await self._block(replace(request, tokens=tokens, sampling=sampling)))
        return joined(parts)

    async def _block(self, request: GenerationRequest) -> Generation:
        """Returns the draft up to its first selected token, with the token that replaces this one."""
        limit = request.sampling.max_tokens if self.threshold is None else self.draft_tokens
        sampling = replace(request.sampling, max_tokens=min(limit, request.sampling.max_tokens))
        draft = await self.primary.generate(replace(request, sampling=sampling))
        if not len(draft.tokens):
            return replace(draft, quantities=np.empty((0, 1)))
        start, tokens = len(request.tokens), np.concatenate([request.tokens, draft.tokens])
        scores = await self.second.log_probs(request.id, request.group, tokens, start)
        delta = scores.astype(np.float64) - draft.log_probs
        cut = first_below(delta, self.threshold)
        if cut == len(delta):
            return kept(draft, delta, cut)
        one = replace(request.sampling, max_tokens=1)
        seed = second_seed(request.seed)
        drawn = await self.second.generate(replace(request, tokens=tokens[: start + cut], sampling=one, seed=seed))
        return joined([kept(draft, delta, cut), replaced(draft, delta, cut, drawn)])


def second_seed(seed: int) -> int:
    """Returns the seed of the second model's draws, which must be independent of those of the primary model.

    With deterministic inference, SGLang's random numbers at a position follow from the seed and the position alone.
    """
    return sampling_seed(seed, "second", 0, 0)


def first_below(delta: Floats, threshold: float | None) -> int:
    """Returns the first position with Δ below the threshold; the number of positions if there is none."""
    if threshold is None:
        return len(delta)
    return int(np.append(np.flatnonzero(delta < threshold), len(delta))[0])


def kept(draft: Generation, delta: Floats, count: int) -> Generation:
    """Returns the first ``count`` tokens of a draft, with their Δ; ``delta`` is ``[R]``."""
    none = np.zeros(count, np.bool_)
    return replace(
        draft,
        tokens=draft.tokens[:count],
        log_probs=draft.log_probs[:count],
        selected=none,
        changed=none,
        quantities=delta[:count, None],
    )


def replaced(draft: Generation, delta: Floats, position: int, drawn: Generation) -> Generation:
    """Returns what the second model has drawn in the place of a token of a draft.

    Args:
        draft: The draft.
        delta: ``[R]``, Δ of its tokens.
        position: Position of the token.
        drawn: One token, or none if the request was aborted.
    """
    selected = np.ones(len(drawn.tokens), np.bool_)
    return replace(
        drawn,
        selected=selected,
        changed=drawn.tokens != draft.tokens[position],
        quantities=np.full((len(drawn.tokens), 1), delta[position]),
    )


def joined(parts: Sequence[Generation]) -> Generation:
    """Returns consecutive parts of a response as one; the last part says how it ends."""
    quantities = [part.quantities for part in parts if part.quantities is not None]
    return Generation(
        tokens=np.concatenate([part.tokens for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        spans=parts[0].spans[:1] or parts[-1].spans[:1],
        finish_reason=parts[-1].finish_reason,
        selected=np.concatenate([part.selected for part in parts]),
        changed=np.concatenate([part.changed for part in parts]),
        quantities=np.concatenate(quantities),
        retractions=sum(part.retractions for part in parts),
    )
