"""Prompts, sampled responses and groups, over numpy arrays (a Python list costs 69 bytes a token).

They are checked once, where they enter the trainer. Later code does not check their values again.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]

_LOG_PROB_ROUNDING = 1e-3
"""Largest log-prob above 0 that counts as rounding of an engine's softmax; it becomes 0."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A problem to answer.

    Attributes:
        id: Identifier, unique in the run.
        tokens: Token ids with the chat template applied, ``[P]`` int32.
        ground_truth: Right answer, for the verifier.
        data_source: Name of the data set.
    """

    id: str
    tokens: NDArray[np.int32]
    ground_truth: str
    data_source: str = ""

    def __post_init__(self) -> None:
        """Checks the tokens.

        Raises:
            ValueError: The tokens are invalid; the message names the prompt and the field.
        """
        object.__setattr__(self, "tokens", _token_ids("tokens", self.tokens, f"prompt {self.id!r}"))


@dataclass(frozen=True)
class TokenSpan:
    """A span of response tokens, up to the start of the next span, that were sampled with the same weights.

    Attributes:
        start: Index of the first response token of the span.
        weight_version: Version of the weights.
    """

    start: int
    weight_version: int


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled response with all that training on it requires.

    The arrays are read-only. They are copies, unless what was given is read-only and of the right type.

    Attributes:
        prompt: Prompt of the response.
        sample: Number of the response among those to its prompt.
        tokens: Response tokens, ``[R]`` int32, R ≥ 1, with the end-of-sequence token if it was sampled.
        behaviour_log_probs: The engine's log-probs of ``tokens``, ``[R]`` float32, ≤ 0 and finite; rounding above 0 is
            cut off.
        mask: Tokens to learn from, ``[R]`` bool (0/1 integers are converted); 0 for text that was not sampled.
        spans: Weight versions that sampled the tokens; the first span starts at 0.
        finish_reason: ``stop``: end of sequence; ``length``: cut off at the limit; ``abort``: stopped by the trainer.
        reward: Shaped reward; None before scoring, and for a response whose check failed and that is masked.
        accuracy: The verifier's verdict, 0 or 1; None where ``reward`` is.
        advantage: Advantage relative to the group; None until the group is complete, 0 without a reward.
        failure: Kind of failure of a check without a verdict; empty if there is a verdict.
    """

    prompt: Prompt
    sample: int
    tokens: NDArray[np.int32]
    behaviour_log_probs: NDArray[np.float32]
    mask: NDArray[np.bool_]
    spans: tuple[TokenSpan, ...] = (TokenSpan(0, 0),)
    finish_reason: FinishReason = "stop"
    reward: float | None = None
    accuracy: int | None = None
    advantage: float | None = None
    failure: str = ""

    def __post_init__(self) -> None:
        """Checks all values that a step relies on.

        Raises:
            ValueError: A field is invalid; the message names the trajectory, the field and the value.
        """
        where = f"trajectory {self.name}"
        object.__setattr__(self, "tokens", _token_ids("tokens", self.tokens, where))
        log_probs = _float32("behaviour_log_probs", self.behaviour_log_probs, len(self.tokens), where)
        if (above := float(log_probs.max()) > 0) and (log_probs > _LOG_PROB_ROUNDING).any():
            at = int(np.argmax(log_probs))
            raise ValueError(f"{where}: behaviour_log_probs: must be <= 0, got {log_probs[at]} at token {at}")
        object.__setattr__(self, "behaviour_log_probs", _frozen(np.minimum(log_probs, 0) if above else log_probs))
        object.__setattr__(self, "mask", _binary("mask", self.mask, len(self.tokens), where))
        if self.finish_reason not in get_args(FinishReason):
            valid = ", ".join(get_args(FinishReason))
            raise ValueError(f"{where}: finish_reason: must be one of {valid}, got {self.finish_reason!r}")
        starts = [span.start for span in self.spans]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= len(self.tokens):
            raise ValueError(
                f"{where}: spans: must start at 0 and increase within {len(self.tokens)} tokens, got {starts}"
            )
        self._check_scores()

    def _check_scores(self) -> None:
        where = f"trajectory {self.name}"
        for field in ("reward", "advantage"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, int | float | np.number) and np.isfinite(value)):
                raise ValueError(f"{where}: {field}: must be a finite number, got {value!r}")
        if self.accuracy not in (None, 0, 1):
            raise ValueError(f"{where}: accuracy: must be 0 or 1, got {self.accuracy}")

    def with_score(self, score: Score) -> Trajectory:
        """Returns this response with its score; it shares the arrays, which are not checked again.

        A response without a reward is masked.

        Raises:
            ValueError: The reward is not finite, or the accuracy is neither 0 nor 1.
        """
        found = copy(self)
        for field in ("reward", "accuracy", "failure"):
            object.__setattr__(found, field, getattr(score, field))
        if score.reward is None:
            object.__setattr__(found, "mask", _frozen(np.zeros_like(self.mask)))
        found._check_scores()
        return found

    def with_advantage(self, advantage: float) -> Trajectory:
        """Returns this response with an advantage; it shares the arrays, which are not checked again.

        Raises:
            ValueError: The advantage is not finite.
        """
        found = copy(self)
        object.__setattr__(found, "advantage", advantage)
        found._check_scores()
        return found

    @property
    def name(self) -> str:
        """Name in messages and files: ``<prompt id>/<sample>``."""
        return f"{self.prompt.id}/{self.sample}"

    def __len__(self) -> int:
        """Returns the number of prompt and response tokens together."""
        return len(self.prompt.tokens) + len(self.tokens)


@dataclass(frozen=True)
class Score:
    """The score of one response.

    Attributes:
        reward: Reward after shaping; None for a response that is masked because its check failed.
        accuracy: 1 for a right answer, otherwise 0; dynamic sampling reads it. None if ``reward`` is.
        failure: Kind of failure of a check without a verdict; empty if there is a verdict.
        failure_text: Error text of the failure.
        asked: Whether the verifier was asked.
    """

    reward: float | None
    accuracy: int | None
    failure: str = ""
    failure_text: str = ""
    asked: bool = True


@dataclass(frozen=True, eq=False)
class Group:
    """The responses to one prompt, in the order of their sample numbers."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        """Checks that the responses belong together.

        Raises:
            ValueError: A response is to another prompt, or the sample numbers do not increase.
        """
        samples = [trajectory.sample for trajectory in self.trajectories]
        if any(trajectory.prompt.id != self.prompt.id for trajectory in self.trajectories):
            raise ValueError(f"group {self.prompt.id!r}: holds responses to another prompt")
        if samples != sorted(set(samples)):
            raise ValueError(f"group {self.prompt.id!r}: sample numbers must increase, got {samples}")


def _array(field: str, value: Any, length: int | None, where: str) -> NDArray[Any]:
    array = np.asarray(value)
    if array.ndim != 1 or length not in (None, len(array)):
        expected = "[R]" if length is None else f"[{length}], one value per token"
        raise ValueError(f"{where}: {field}: expected shape {expected}, got {list(array.shape)}")
    return array


def _token_ids(field: str, value: Any, where: str) -> NDArray[np.int32]:
    array = _array(field, value, None, where)
    if not array.size:
        raise ValueError(f"{where}: {field}: is empty")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{where}: {field}: expected integer token ids, got {array.dtype}")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{where}: {field}: token ids must be >= 0, got {array.min()} .. {array.max()}")
    return _frozen(_as_type(array, np.int32))


def _float32(field: str, value: Any, length: int, where: str) -> NDArray[np.float32]:
    array = _array(field, value, length, where)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{where}: {field}: expected floating point, got {array.dtype}")
    with np.errstate(over="ignore"):
        converted: NDArray[np.float32] = _as_type(array, np.float32)
    if not np.isfinite(converted).all():
        at = int(np.argmin(np.isfinite(converted)))
        raise ValueError(f"{where}: {field}: must be finite in float32, got {array[at]} at token {at}")
    return converted


def _binary(field: str, value: Any, length: int, where: str) -> NDArray[np.bool_]:
    array = _array(field, value, length, where)
    if array.dtype != np.bool_:
        wrong = ~((array == 0) | (array == 1))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(f"{where}: {field}: must be 0 or 1, got {array[at]} at token {at}")
    return _frozen(_as_type(array, np.bool_))


def _as_type(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Returns a read-only array of this type as it is, and a copy of any other."""
    return array.astype(dtype, copy=array.dtype != dtype or array.flags.writeable)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Makes an array read-only, so that checked values cannot change."""
    array.flags.writeable = False
    return array
