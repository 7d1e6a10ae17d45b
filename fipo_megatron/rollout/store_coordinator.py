"""Messages between the ranks of a run while responses are sampled: through torch's store, outside all process groups.

Sampling takes longer than any collective may wait. So what ranks have to tell each other meanwhile is small, goes
through a store, and every rank that is waited for shows from time to time that it is alive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import torch.distributed as dist

from fipo_megatron.rollout.engine import EngineError

_SHORTEST_POLL, _LONGEST_POLL = 0.002, 0.2
_BEAT_SECONDS = 1.0


class StoreCoordinator:
    """Where the ranks of a run meet. Every rank makes the same calls in the same order.

    Args:
        store: Of all ranks; keys are below ``rollout/``.
        rank: This one.
        leaders: Ranks that have something to say; rank 0 is always heard.
        ranks: How many there are; all of them hear.
        silence_seconds: A rank that is waited for and has shown no sign for so long has failed.

    Attributes:
        progress: What this rank is doing; others see it (:meth:`others`).
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
        self._round = self._beats = 0
        self.progress: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        """This one."""
        return self._rank

    @property
    def leaders(self) -> tuple[int, ...]:
        """Ranks that have something to say."""
        return self._leaders

    async def gather(self, report: Any, error: BaseException | None = None) -> list[Any]:
        """What every leader reports, in the order of :attr:`leaders`, on every rank. Rank 0 collects and publishes it.

        Args:
            report: Of this rank, for JSON (dataclasses are objects); ignored where this rank does not lead.
            error: Why this rank cannot go on; then every rank raises.

        Raises:
            EngineError: a rank failed, or has shown no sign for too long; the message says which and why. Where it is
                this rank, its own ``error``, or one with its text.
        """
        key = f"round/{self._round}"
        if error is not None:
            self.fail(error)
            self._round += 1
            if isinstance(error, EngineError):
                raise error
            raise EngineError(f"{type(error).__name__}: {error}") from error  # all ranks raise alike, and go on alike
        try:
            if self._rank in self._leaders:
                self._store.set(f"{key}/{self._rank}", orjson.dumps(report))
            if self._rank == 0:
                parts = [await self._take(f"{key}/{leader}", leader) for leader in self._leaders]
                self._store.set(key, b"[" + b",".join(parts) + b"]")
                for leader in self._leaders:
                    self._store.delete_key(f"{key}/{leader}")
            found: list[Any] = orjson.loads(await self._take(key, 0))
            if self._store.add(f"{key}/heard", 1) == self._ranks:  # rank 0 does not wait for those that do not lead
                for name in (key, f"{key}/heard", f"count/{self._round}"):
                    self._store.delete_key(name)
            return found
        finally:
            self._round += 1

    def fail(self, error: BaseException) -> None:
        """Tells every rank that waits, or looks, before the next :meth:`gather` is over: this one cannot go on."""
        if not self._store.check([f"failed/{self._round}"]):
            text = f"rank {self._rank}: {type(error).__name__}: {error}"
            self._store.set(f"failed/{self._round}", text.encode())

    def count(self, more: int) -> int:
        """Adds to a number that all ranks share until the next :meth:`gather`; what it is then."""
        return int(self._store.add(f"count/{self._round}", more))

    def look(self) -> None:
        """Raises EngineError where another rank has failed."""
        if self._store.check([f"failed/{self._round}"]):
            raise EngineError(self._store.get(f"failed/{self._round}").decode())

    def others(self) -> dict[int, dict[str, Any]]:
        """What every leader is doing, by rank; without those that have not said."""
        found = {}
        for leader in self._leaders:
            if self._store.check([f"beat/{leader}"]):
                found[leader] = orjson.loads(self._store.get(f"beat/{leader}"))["progress"]
        return found

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """A block in which this rank shows that it is alive."""
        task = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            self._beats += 1
            self._store.set(f"beat/{self._rank}", orjson.dumps({"number": self._beats, "progress": self.progress}))
            await asyncio.sleep(_BEAT_SECONDS)

    async def _take(self, key: str, of: int) -> bytes:
        """Waits for a key that rank ``of`` sets."""
        pause, last, since = _SHORTEST_POLL, b"", time.monotonic()
        async with self.alive():
            while not self._store.check([key]):
                self.look()
                if self._store.check([f"beat/{of}"]) and (beat := self._store.get(f"beat/{of}")) != last:
                    last, since = beat, time.monotonic()
                if time.monotonic() - since > self._silence:
                    error = EngineError(f"rank {of} has shown no sign for {self._silence:g} s; see its log")
                    self.fail(error)
                    raise error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL)
            return bytes(self._store.get(key))
