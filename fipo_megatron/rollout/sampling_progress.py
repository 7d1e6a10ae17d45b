"""How far sampling is, for people to look at; no decision depends on it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class ProgressSnapshot(NamedTuple):
    """How far sampling is.

    Attributes:
        done: Responses that are complete.
        begun: Responses that were asked for.
        tokens: Of those that are complete.
        oldest_seconds: Since the response that has been in flight longest was asked for.
    """

    done: int = 0
    begun: int = 0
    tokens: int = 0
    oldest_seconds: float = 0.0


class SamplingProgress:
    """Counts the responses of a step on this rank."""

    def __init__(self) -> None:
        self._in_flight: dict[int, float] = {}
        self._done = self._begun = self._tokens = 0

    def reset(self) -> None:
        """A step begins."""
        self._done = self._begun = self._tokens = 0

    @contextmanager
    def response(self) -> Iterator[None]:
        """A block in which one is in flight."""
        self._begun += 1
        number = self._begun
        self._in_flight[number] = time.monotonic()
        try:
            yield
        finally:
            self._in_flight.pop(number, None)

    def complete(self, tokens: int) -> None:
        """One is complete."""
        self._done += 1
        self._tokens += tokens

    def now(self) -> ProgressSnapshot:
        """How far this rank is; from any thread."""
        started = min([*self._in_flight.values()], default=time.monotonic())
        return ProgressSnapshot(self._done, self._begun, self._tokens, time.monotonic() - started)


def combine_snapshots(parts: Iterable[ProgressSnapshot]) -> ProgressSnapshot:
    """Of several ranks."""
    found = [ProgressSnapshot(*part) for part in parts] or [ProgressSnapshot()]
    return ProgressSnapshot(
        *(sum(part[field] for part in found) for field in range(3)), max(part.oldest_seconds for part in found)
    )
