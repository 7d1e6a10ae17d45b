"""Messages between the ranks of a run while responses are sampled, through torch's store and outside process groups.

Sampling takes longer than a collective may wait. So the messages are small and go through a store, and every rank that
others wait for sends a heartbeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import torch.distributed as dist

from fipo_megatron.rollout.engine import EngineError, LostRankError, PermanentEngineError, RequestError
from fipo_megatron.rollout.silence_timer import SilenceTimer

_SHORTEST_POLL, _LONGEST_POLL = 0.002, 0.2
_BEAT_SECONDS = 1.0
_CLOSED = 1 << 40


class StoreCoordinator:
    """Gathers reports of the ranks of a run. Every rank makes the same calls in the same order.

    Args:
        store: Store of all ranks; keys are below ``rollout/``.
        rank: This rank.
        leaders: Ranks that report. Rank 0 collects the reports, whether it is a leader or not.
        ranks: Number of ranks; all of them receive the reports.
        silence_seconds: Seconds without a heartbeat after which a rank that others wait for counts as failed.

    Attributes:
        progress: Progress of this rank, for :meth:`others`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        leaders: Sequence[int] = (0,),
        ranks: int = 1,
        *,
        silence_seconds: float = 600.0,
    ) -> None:
        self._store = dist.PrefixStore("rollout", store)
        self._rank, self._leaders, self._ranks = rank, tuple(leaders), ranks
        self._silence = silence_seconds
        self._round = self._beats = self._claims = 0
        self.progress: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def leaders(self) -> tuple[int, ...]:
        """Ranks that report."""
        return self._leaders

    async def gather(self, report: Any, error: BaseException | None = None) -> list[Any]:
        """Returns the reports of all leaders, in the order of :attr:`leaders`, on every rank.

        Args:
            report: Report of this rank, written as JSON (a dataclass becomes an object); ignored on ranks that are not
                leaders.
            error: Error for which this rank cannot continue; every rank raises then.

        Raises:
            EngineError: a rank failed; the message names the rank and the reason. On the rank that failed, its own
                ``error``, or an EngineError with its text. A PermanentEngineError, on all ranks, if ``error`` is one or
                a RequestError.
            LostRankError: the heartbeat of a rank stopped; on every other rank.
        """
        key = f"round/{self._round}"
        if error is not None:
            self.fail(error)
            self._round += 1
            if isinstance(error, EngineError | LostRankError):
                raise error
            raise _kind(error)(f"{type(error).__name__}: {error}") from error  # all ranks raise the same type
        try:
            if self._rank in self._leaders:
                self._store.set(f"{key}/{self._rank}", orjson.dumps(report).decode())
            if self._rank == 0:
                parts = [await self._take(f"{key}/{leader}", leader) for leader in self._leaders]
                self._store.set(key, f"[{b','.join(parts).decode()}]")
                for leader in self._leaders:
                    self._store.delete_key(f"{key}/{leader}")
            found: list[Any] = orjson.loads(await self._take(key, 0))
            if self._store.add(f"{key}/heard", 1) == self._ranks:  # rank 0 does not wait for the others to read
                before = self._round - 1  # every rank has counted the claims of the round before
                for name in (key, f"{key}/heard", f"count/{self._round}", f"claims/{before}", f"claimed/{before}"):
                    self._store.delete_key(name)
            return found
        finally:
            self._round += 1

    def fail(self, error: BaseException) -> None:
        """Reports that this rank cannot continue; :meth:`gather` and :meth:`look` raise on the others this round."""
        if not self._store.check([f"failed/{self._round}"]):
            failure = {"kind": _kind(error).__name__, "text": f"rank {self._rank}: {type(error).__name__}: {error}"}
            self._store.set(f"failed/{self._round}", orjson.dumps(failure).decode())

    def count(self, more: int) -> int:
        """Adds to a counter that all ranks share until the next :meth:`gather`; returns its new value."""
        return int(self._store.add(f"count/{self._round}", more))

    def open_claims(self) -> None:
        """Opens the claims of this round, before its :meth:`gather`."""
        self._claims = self._round

    def claim(self) -> int:
        """Returns a number that no other claim of this round gets: 0, 1, 2, …; at least 2^40 once they are closed."""
        return int(self._store.add(f"claims/{self._claims}", 1)) - 1

    def close_claims(self) -> int:
        """Returns how many claims were made until the first rank closed them, the same number on every rank.

        Must be called before the :meth:`gather` of the next round. Another rank may still claim, if one has failed.
        """
        value = int(self._store.add(f"claims/{self._claims}", _CLOSED))
        if value < 2 * _CLOSED:
            self._store.set(f"claimed/{self._claims}", str(value - _CLOSED))
        return int(self._store.get(f"claimed/{self._claims}"))

    def look(self) -> None:
        """Raises EngineError if another rank has failed, LostRankError if one is lost."""
        if self._store.check([f"failed/{self._round}"]):
            failure = orjson.loads(self._store.get(f"failed/{self._round}"))
            raise _KINDS[failure["kind"]](failure["text"])

    def others(self) -> dict[int, dict[str, Any]]:
        """Returns the progress of the leaders by rank, without those that have sent no heartbeat yet."""
        found = {}
        for leader in self._leaders:
            if self._store.check([f"beat/{leader}"]):
                found[leader] = orjson.loads(self._store.get(f"beat/{leader}"))["progress"]
        return found

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Opens a block during which this rank sends a heartbeat."""
        task = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            self._beats += 1
            self._store.set(
                f"beat/{self._rank}", orjson.dumps({"number": self._beats, "progress": self.progress}).decode()
            )
            await asyncio.sleep(_BEAT_SECONDS)

    async def _take(self, key: str, of: int) -> bytes:
        """Waits for a key that rank ``of`` sets, and returns its value."""
        pause, last, silence = _SHORTEST_POLL, b"", SilenceTimer()
        async with self.alive():
            while not self._store.check([key]):
                self.look()
                if self._store.check([f"beat/{of}"]) and (beat := self._store.get(f"beat/{of}")) != last:
                    last = beat
                    silence.heard()
                if silence.seconds() > self._silence:
                    error = LostRankError(f"rank {of} has sent no heartbeat for {self._silence:g} s; see its log")
                    self.fail(error)
                    raise error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL)
            return bytes(self._store.get(key))


_Kind = type[EngineError] | type[LostRankError]
_KINDS: dict[str, _Kind] = {kind.__name__: kind for kind in (EngineError, PermanentEngineError, LostRankError)}


def _kind(error: BaseException) -> _Kind:
    """Returns the type of error that all ranks raise."""
    if isinstance(error, LostRankError):
        return LostRankError
    return PermanentEngineError if isinstance(error, PermanentEngineError | RequestError) else EngineError
