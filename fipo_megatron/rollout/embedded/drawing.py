"""Draws tokens: one from each distribution of a batch, from one model or by a rule from two.

Each sequence has two streams of random numbers. Every rule draws with the first one wherever its choice of the model
does not depend on a drawn token, so that a rule that never leaves, or always takes, a model gives that model's own
responses bit for bit. The second stream is for what else a rule needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_LARGEST_DISTANCE = 700.0  # exp overflows in float64 beyond it
Selector = Literal["delta", "js", "kl", "kl_reverse", "entropy", "random"]
"""Quantity that selects the positions of :class:`Swap`."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The tokens of a draw.

    Attributes:
        tokens: ``[B]`` int64.
        log_probs: ``[B]`` float64, log-probs of the tokens under the distributions that they were drawn from, before
            nucleus filtering.
        selected: ``[B]`` bool: positions at which a rule departed from the primary model.
        changed: ``[B]`` bool: selected positions at which the primary model would have drawn another token.
        quantities: ``[B, Q]`` float64: quantities by which a rule selects, or the entropies in nats, at
            ``Draw.entropy_at``, of the distributions that the tokens have; None if it reports none.
    """

    tokens: NDArray[np.int64]
    log_probs: Floats
    selected: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    quantities: Floats | None = None


@dataclass(frozen=True, eq=False)
class Draw:
    """Settings and random numbers with which a batch of sequences is drawn.

    Attributes:
        temperatures: ``[B, 1]`` float64, divisors of the logits.
        top_p: ``[B]`` float64, probability of the nucleus.
        uniform: ``[2, B]`` float64 in [0, 1), from the two streams of each sequence.
        entropy_at: Factors of the temperatures at which entropies are measured; empty measures none.
    """

    temperatures: Tensor
    top_p: Floats
    uniform: Floats
    entropy_at: tuple[float, ...] = ()

    def log_probs(self, logits: Tensor) -> Floats:
        """Returns the log-probs after temperature, ``[B, V]``; ``logits`` is ``[B, V]`` float64."""
        tempered = logits if (self.temperatures == 1).all() else logits / self.temperatures
        found: Floats = torch.log_softmax(tempered, -1).numpy()
        return found

    def tokens(self, log_probs: Floats, stream: int = 0) -> NDArray[np.int64]:
        """Returns a token of each distribution, ``[B]``."""
        return draw(log_probs, self.top_p, self.uniform[stream])

    def probabilities(self, log_probs: Floats) -> Floats:
        """Returns the distributions of :meth:`tokens`, ``[B, V]``: after nucleus filtering, normalised."""
        kept = nucleus(np.exp(log_probs), self.top_p)
        normalised: Floats = kept / kept.sum(axis=1, keepdims=True)
        return normalised

    def entropies(self, distribution: Callable[[Draw], Floats]) -> Floats | None:
        """Returns ``Drawn.quantities``: the entropies of distributions, or None if none are asked for.

        Args:
            distribution: Returns the distributions of the tokens, ``[B, V]``, under a draw at other temperatures.
        """
        if not self.entropy_at:
            return None
        found = (distribution(replace(self, temperatures=self.temperatures * factor)) for factor in self.entropy_at)
        return np.stack([_entropy(probabilities) for probabilities in found], axis=1)


class TwoModelRule(Protocol):
    """Draws tokens from a primary and a second model over the same vocabulary."""

    def __call__(self, primary: Tensor, second: Tensor, how: Draw) -> Drawn:
        """Draws one token per sequence; ``primary`` and ``second`` are logits, ``[B, V]`` float64."""


def draw_from_one(logits: Tensor, how: Draw) -> Drawn:
    """Draws one token per sequence from one model; ``logits`` is ``[B, V]`` float64."""
    log_probs = how.log_probs(logits)
    tokens = how.tokens(log_probs)
    none = np.zeros(len(tokens), np.bool_)
    entropies = how.entropies(lambda other: other.probabilities(other.log_probs(logits)))
    return Drawn(tokens, _of(log_probs, tokens), none, none, entropies)


@dataclass(frozen=True)
class Swap:
    """Draws the token of the second model at selected positions, and that of the primary model elsewhere.

    The quantities are those of ``fipo compare shift``, after temperature, with the second model in the place of RL and
    the primary model in the place of base. With ``delta`` the primary model draws first. Its token is replaced by one
    of the second model if log π_second − log π_primary of it is below the threshold. The probability of a token y is
    then π_primary(y)·1[Δ(y) ≥ τ] + P_primary(Δ < τ)·π_second(y). The other quantities do not depend on a token. A
    position is selected if they are above the threshold. ``random`` is a number in [0, 1).

    Attributes:
        selector: Quantity that selects.
        threshold: Threshold τ of the quantity.
    """

    selector: Selector
    threshold: float

    def __call__(self, primary: Tensor, second: Tensor, how: Draw) -> Drawn:
        """Draws one token per sequence; see :class:`TwoModelRule`."""
        first, other = how.log_probs(primary), how.log_probs(second)
        own = how.tokens(first)
        quantity = _quantity(self.selector, first, other, own, how)
        if self.selector == "delta":
            selected = quantity < self.threshold
            theirs = how.tokens(other, stream=1)
        else:
            selected = quantity > self.threshold
            theirs = how.tokens(other)
        tokens = np.where(selected, theirs, own)
        log_probs = np.where(selected, _of(other, theirs), _of(first, own))
        return Drawn(tokens, log_probs, selected, selected & (theirs != own), quantity[:, None])


@dataclass(frozen=True)
class PrimaryAlone:
    """Draws from the primary model alone, and reports the quantities by which :class:`Swap` would select.

    Attributes:
        selectors: Quantities to report.
    """

    selectors: tuple[Selector, ...]

    def __call__(self, primary: Tensor, second: Tensor, how: Draw) -> Drawn:
        """Draws one token per sequence; see :class:`TwoModelRule`."""
        drawn = draw_from_one(primary, how)
        first, other = how.log_probs(primary), how.log_probs(second)
        columns = [_quantity(selector, first, other, drawn.tokens, how) for selector in self.selectors]
        return replace(drawn, quantities=np.stack(columns, axis=1))


@dataclass(frozen=True)
class Amplify:
    """Draws from (1 + γ)·log π_RL − γ·log π_base where the primary model's token has a small Δlog p.

    The primary model draws first. Where log π_RL − log π_base of its token, after temperature, is below the threshold,
    the token is drawn again from the amplified distribution, and its temperature and nucleus are applied after mixing.

    Attributes:
        gamma: γ; 0 is RL itself.
        threshold: Threshold of Δlog p; None amplifies every position, and the primary model draws nothing.
        primary_is_rl: Whether the primary model is RL, the second one base; otherwise the other way round.
    """

    gamma: float
    threshold: float | None = None
    primary_is_rl: bool = True

    def __call__(self, primary: Tensor, second: Tensor, how: Draw) -> Drawn:
        """Draws one token per sequence; see :class:`TwoModelRule`."""
        rl, base = (primary, second) if self.primary_is_rl else (second, primary)
        mixed, first = self._mixed(rl, base, how), how.log_probs(primary)
        own = how.tokens(first)
        entropies = how.entropies(lambda other: self.probabilities(primary, second, other))
        if self.threshold is None:
            tokens = how.tokens(mixed)
            return Drawn(tokens, _of(mixed, tokens), np.ones(len(own), np.bool_), tokens != own, entropies)
        delta = _of(how.log_probs(rl), own) - _of(how.log_probs(base), own)
        selected = delta < self.threshold
        again = how.tokens(mixed, stream=1)
        tokens = np.where(selected, again, own)
        log_probs = np.where(selected, _of(mixed, again), _of(first, own))
        return Drawn(tokens, log_probs, selected, selected & (again != own), entropies)

    def probabilities(self, primary: Tensor, second: Tensor, how: Draw) -> Floats:
        """Returns the distributions of the drawn tokens, ``[B, V]``.

        With a threshold τ, the probability of a token y is π_primary(y)·1[Δ(y) ≥ τ] + P_primary(Δ < τ)·π_mixed(y).
        """
        rl, base = (primary, second) if self.primary_is_rl else (second, primary)
        mixed = how.probabilities(self._mixed(rl, base, how))
        if self.threshold is None:
            return mixed
        own = how.probabilities(how.log_probs(primary))
        stays = np.where(how.log_probs(rl) - how.log_probs(base) < self.threshold, 0.0, own)
        marginal: Floats = stays + np.maximum(0, 1 - stays.sum(axis=1, keepdims=True)) * mixed
        return marginal

    def _mixed(self, rl: Tensor, base: Tensor, how: Draw) -> Floats:
        return how.log_probs(rl if self.gamma == 0 else rl + self.gamma * (rl - base))


def _of(log_probs: Floats, tokens: NDArray[np.int64]) -> Floats:
    """Returns the log-probs of tokens, ``[B]``."""
    found: Floats = log_probs[np.arange(len(tokens)), tokens]
    return found


def _quantity(selector: Selector, first: Floats, other: Floats, own: NDArray[np.int64], how: Draw) -> Floats:
    """Returns a quantity at each position, ``[B]``.

    Args:
        selector: The quantity.
        first: ``[B, V]``, log-probs of the primary model.
        other: ``[B, V]``, log-probs of the second model.
        own: ``[B]``, tokens that the primary model draws.
        how: Draw with the random numbers of ``random``.
    """
    if selector == "delta":
        return _of(other, own) - _of(first, own)
    if selector == "random":
        random: Floats = how.uniform[1]
        return random
    if selector == "entropy":
        return _expectation(first, -first)
    if selector == "kl":
        return _expectation(other, other - first)
    if selector == "kl_reverse":
        return _expectation(first, first - other)
    # log of the mean of both distributions over one of them, exactly 0 where they are equal
    distance = np.clip(other - first, -_LARGEST_DISTANCE, _LARGEST_DISTANCE)
    over_first, over_other = np.log1p(np.expm1(distance) / 2), np.log1p(np.expm1(-distance) / 2)
    js: Floats = -(_expectation(first, over_first) + _expectation(other, over_other)) / 2
    return js


def _expectation(log_probs: Floats, values: Floats) -> Floats:
    """Returns the mean of values under distributions, ``[B]``; a token of probability 0 counts nothing."""
    probabilities = np.exp(log_probs)
    found: Floats = np.sum(np.where(probabilities > 0, probabilities * values, 0.0), axis=1)
    return found


def _entropy(probabilities: Floats) -> Floats:
    """Returns the entropies of distributions in nats, ``[B]``."""
    found: Floats = -np.sum(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0)), axis=1)
    return found


def nucleus(probabilities: Floats, top_p: Floats) -> Floats:
    """Returns distributions ``[B, V]`` with 0 outside the nucleus, not normalised; see :func:`draw`."""
    [filtered] = np.nonzero(top_p < 1)
    if len(filtered):
        some = probabilities[filtered]
        order = np.argsort(-some, axis=1, kind="stable")
        cumulative = np.cumsum(np.take_along_axis(some, order, 1), axis=1)
        outside = np.zeros_like(some, dtype=bool)
        np.put_along_axis(outside, order[:, 1:], cumulative[:, :-1] >= top_p[filtered, None], 1)
        probabilities = probabilities.copy()
        probabilities[filtered] = np.where(outside, 0, some)
    return probabilities


def draw(log_probs: NDArray[np.float64], top_p: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the token at ``uniform`` of each cumulative distribution over tokens in the order of their ids.

    Args:
        log_probs: ``[B, V]`` float64, normalised.
        top_p: ``[B]``, nucleus: only the fewest most probable tokens that together have at least this probability are
            drawn; ties go to smaller ids.
        uniform: ``[B]``, numbers in [0, 1).

    Returns:
        ``[B]`` int64.
    """
    probabilities = nucleus(np.exp(log_probs), top_p)
    cumulative = np.cumsum(probabilities, axis=1)
    below = cumulative <= (uniform * cumulative[:, -1])[:, None]
    drawn: NDArray[np.int64] = np.argmin(below, axis=1)
    for row in np.flatnonzero(below[:, -1]):  # the product was rounded up to the last sum
        drawn[row] = np.flatnonzero(probabilities[row])[-1]
    return drawn
