"""The load of SGLang servers while they sample: requests that run and wait, and the KV cache in use."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.client import SglangClient

_PATH = "/v1/loads?include=core"
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class LoadSample:
    """The load of one server at one time.

    Attributes:
        url: URL of the server.
        seconds: Time at which the server looked, in seconds on its clock.
        running: Requests that are sampled.
        waiting: Requests that wait for a place.
        used: Tokens in the KV cache that belong to requests.
        capacity: Tokens that the KV cache holds.
    """

    url: str
    seconds: float
    running: int
    waiting: int
    used: int
    capacity: int


@dataclass(frozen=True)
class Interval:
    """Time that running responses took to grow from one mean length to another.

    Attributes:
        start: Mean number of response tokens at the begin.
        end: Mean number of response tokens at the end.
        seconds: Seconds between the two.
    """

    start: float
    end: float
    seconds: float


class LoadMonitor:
    """Asks every server for its load at short intervals, as long as its block runs.

    Args:
        client: Client of the servers.

    Attributes:
        samples: Loads in the order in which they were read.
        problem: Reason why the servers do not tell their load; empty if they do.
    """

    def __init__(self, client: SglangClient) -> None:
        self.samples: list[LoadSample] = []
        self.problem = ""
        self._client = client
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LoadMonitor:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            try:
                answers = await self._client.look_up(_PATH)
                self._add([sample for url, answer in answers.items() for sample in load_samples(url, answer)])
            except (EngineError, KeyError, TypeError, ValueError) as error:  # a lost server does not answer
                self.problem = f"{type(error).__name__}: {error}"
            await asyncio.sleep(_POLL_SECONDS)

    def _add(self, samples: Sequence[LoadSample]) -> None:
        """Adds what is new; a server that is busy answers with the load at which it looked last."""
        last = {sample.url: sample.seconds for sample in self.samples}
        self.samples += [sample for sample in samples if sample.seconds > last.get(sample.url, 0.0)]

    def summary(self) -> dict[str, Any] | None:
        """Returns the largest use of a server's KV cache and the longest queue; None if no server told its load."""
        if not self.samples:
            return None
        fullest = max(self.samples, key=lambda sample: sample.used / max(1, sample.capacity))
        return {
            "capacity_tokens": fullest.capacity,
            "peak_tokens": fullest.used,
            "peak_usage": fullest.used / max(1, fullest.capacity),
            "peak_running": max(sample.running for sample in self.samples),
            "peak_waiting": max(sample.waiting for sample in self.samples),
        }

    def intervals(self, prompt_tokens: int) -> list[Interval]:
        """Returns the growth of the running responses between samples in which the same number ran."""
        found = []
        for url in {sample.url for sample in self.samples}:
            mine = [sample for sample in self.samples if sample.url == url]
            for one, two in pairwise(mine):
                if one.running == two.running > 0 and two.used > one.used:
                    start, end = (sample.used / sample.running - prompt_tokens for sample in (one, two))
                    found.append(Interval(max(0.0, start), max(0.0, end), two.seconds - one.seconds))
        return found


def load_samples(url: str, answer: dict[str, Any]) -> list[LoadSample]:
    """Returns the loads in an answer of ``/v1/loads`` of SGLang 0.5.23.

    Raises:
        KeyError: The answer lacks a field.
    """
    names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens")
    return [LoadSample(url, float(load["timestamp"]), *(int(load[name]) for name in names)) for load in answer["loads"]]


def seconds_by_position(intervals: Sequence[Interval], longest: int, parts: int = 8) -> list[dict[str, float]]:
    """Returns the mean seconds per token for each part of a response, from the intervals whose middle lies in it.

    Args:
        intervals: Growth of responses.
        longest: Tokens of the longest response.
        parts: Number of equal parts.
    """
    members: dict[int, list[Interval]] = {}
    for interval in intervals:
        part = min(parts - 1, int((interval.start + interval.end) / 2 * parts / longest))
        members.setdefault(part, []).append(interval)
    return [
        {
            "from": min(one.start for one in found),
            "to": max(one.end for one in found),
            "seconds_per_token": sum(one.seconds for one in found) / sum(one.end - one.start for one in found),
        }
        for _, found in sorted(members.items())
    ]
