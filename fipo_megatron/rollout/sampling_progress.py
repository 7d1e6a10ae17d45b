"""Progress of sampling, for display only; no decision depends on it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class ProgressSnapshot(NamedTuple):
    """Progress of sampling at one moment.

    Attributes:
        done: Number of complete responses.
        begun: Number of requested responses.
        tokens: Tokens of the complete responses.
        oldest_seconds: Seconds since the oldest response in flight was requested.
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
        """Sets all counts to 0 at the beginning of a step."""
        self._done = self._begun = self._tokens = 0

    @contextmanager
    def response(self) -> Iterator[None]:
        """Opens a block during which a response is in flight."""
        self._begun += 1
        number = self._begun
        self._in_flight[number] = time.monotonic()
        try:
            yield
        finally:
            self._in_flight.pop(number, None)

    def complete(self, tokens: int) -> None:
        """Counts a complete response of this many tokens."""
        self._done += 1
        self._tokens += tokens

    def now(self) -> ProgressSnapshot:
        """Returns the progress of this rank; may be called from any thread."""
        started = min([*self._in_flight.values()], default=time.monotonic())
        return ProgressSnapshot(self._done, self._begun, self._tokens, time.monotonic() - started)


def combine_snapshots(parts: Iterable[ProgressSnapshot]) -> ProgressSnapshot:
    """Returns the progress of several ranks together."""
    found = [ProgressSnapshot(*part) for part in parts] or [ProgressSnapshot()]
    return ProgressSnapshot(
        done=sum(part.done for part in found),
        begun=sum(part.begun for part in found),
        tokens=sum(part.tokens for part in found),
        oldest_seconds=max(part.oldest_seconds for part in found),
    )
