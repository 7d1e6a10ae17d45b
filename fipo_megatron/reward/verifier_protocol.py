"""Answers and verdicts, and the protocol of verifiers."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Answer:
    """A response to check.

    Attributes:
        response: Whole text of the response.
        ground_truth: Right answer.
        prompt: Text of the prompt.
        data_source: Name of the data set.
    """

    response: str
    ground_truth: str
    prompt: str = ""
    data_source: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict of a verifier.

    Attributes:
        correct: Whether the answer is right.
        extracted: Text that the verifier took for the answer; None if it names none.
        failure: Kind of failure of a check without a verdict: ``timeout`` (wall time), ``memory``, ``crash``, ``error``
            or ``unreachable``; empty if there is a verdict.
        detail: Error text of a failure.
    """

    correct: bool
    extracted: str | None = None
    failure: str = ""
    detail: str = ""


class Verifier(Protocol):
    """Checks answers, many at a time."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of answers so far: ``verified``, every kind of failure, and ``cpu_limit``: wrong by their CPU time."""

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer. No content of an answer makes it raise.

        Raises:
            VerifierError: The verifier does not start, or its processes crash again and again.
        """

    async def close(self) -> None:
        """Ends the processes and connections of the verifier."""


class CountingVerifier:
    """The counts that all verifiers have."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter(verified=0)

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of answers so far; see :class:`Verifier`."""
        return dict(self._counts)

    def _counted(self, verdict: Verdict) -> Verdict:
        self._counts["verified"] += 1
        if verdict.failure:
            self._counts[verdict.failure] += 1
        return verdict
