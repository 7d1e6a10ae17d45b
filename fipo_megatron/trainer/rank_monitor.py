"""Watches the ranks of a run: ends this process if another rank is lost or fails, and has each error told once.

A collective with a rank that is stopped or dead waits for half an hour. So every rank has two threads beside its work.
One exchanges messages through the store of the run; the other only looks at clocks and processes, and still runs when
the store does not answer. Each rank watches the next one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fipo_megatron.actor.launch import Launch, agent_serves_store
from fipo_megatron.observe import progress
from fipo_megatron.rollout.silence_timer import SilenceTimer
from fipo_megatron.trainer import stacks
from fipo_megatron.trainer.rank_process import RankProcess

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)
_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.25
_GRACE_SECONDS = 3.0
"""Seconds that a rank has to end by itself after another one has failed."""
_GOODBYE_SECONDS = 30.0
"""Seconds that the rank that serves the store waits for the others to end."""
_LATE_SECONDS = 60.0
"""Seconds after which a rank that has not started is named."""


@dataclass(frozen=True)
class RunEnd:
    """The first failure of a run; it ends the run on all ranks.

    Attributes:
        text: The error, with the rank and its host.
        code: Exit code of every rank.
        told_by: Rank that tells the error.
        host: Host of that rank.
        lost: Process of the rank that is lost; None if a rank has failed with an error.
        hangs: Whether no rank makes progress.
    """

    text: str
    code: int
    told_by: int
    host: str
    lost: RankProcess | None = None
    hangs: bool = False

    @classmethod
    def from_json(cls, content: bytes) -> RunEnd:
        """Reads what :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(content)
        lost = values.pop("lost")
        return cls(**values, lost=RankProcess(**lost) if lost else None)

    def to_json(self) -> str:
        """Returns all values as JSON."""
        return json.dumps(asdict(self))


class RankMonitor:
    """The monitor of one rank, from the start of its block to the end.

    With one rank it watches only whether that makes progress, and :meth:`report` tells every error.

    Args:
        launch: Position of this process.
        connect: Function that connects to the store of all ranks; called once by each thread that uses the store.

    Attributes:
        silence_seconds: Seconds without a sign of life after which a rank counts as lost.
        hang_seconds: Seconds without progress on any rank after which the run ends.
    """

    def __init__(self, launch: Launch, connect: Callable[[], dist.Store] | None = None) -> None:
        self.silence_seconds = 600.0
        self.hang_seconds = 1800.0
        self._launch, self._connect = launch, connect
        self._own = RankProcess.own()
        self._next = (launch.rank + 1) % launch.world_size
        self._store: dist.Store | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._reported: BaseException | None = None
        self._leaving: int | None = None  # exit code with which this rank ends by itself
        # Written by the exchanging thread, read by the watching thread:
        self._rounds = self._beats = 0
        self._signs_sent = self._signs = 0  # of progress, of this rank and of all ranks
        self._broken = False
        self._beat, self._neighbour, self._neighbour_done = b"", self._own, False
        self._arrived = self._counted = False
        self._server: RankProcess | None = None  # the process that serves the store, if that is a rank
        self._end: RunEnd | None = None
        # Written by the watching thread, read by the exchanging thread:
        self._found: RunEnd | None = None

    def __enter__(self) -> RankMonitor:
        if self._launch.world_size > 1 and self._connect is not None:
            exchange_store, self._store = self._connect(), self._connect()
            for name, target, arguments in (
                ("ranks", self._exchange, (exchange_store,)),
                ("rank-watch", self._watch, ()),
            ):
                self._threads.append(threading.Thread(target=target, args=arguments, name=name, daemon=True))
        else:
            self._threads.append(threading.Thread(target=self._watch_alone, name="rank-watch", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.report_unexpected(error)
        if self._store is not None:
            with suppress(RuntimeError):  # the store may be gone already
                self._say_goodbye(self._store)
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5 * _BEAT_SECONDS)

    def report(
        self,
        text: str,
        code: int,
        tell: Callable[[str], None],
        error: BaseException | None = None,
        *,
        hangs: bool = False,
    ) -> None:
        """Tells an error of this rank, unless another rank has told one already.

        Args:
            text: The error.
            code: Exit code of the run.
            tell: Prints or logs a text.
            error: The exception, which is told once only.
            hangs: Whether all ranks write their stacks.
        """
        if error is not None and self._reported is error:
            return
        self._reported = error
        if self._store is None:
            tell(text)
            return
        if hangs:
            stacks.write_stacks(text)
        own, first = self.announce(text, code, hangs=hangs)
        if own or (self._launch.rank == 0 and first.host != self._own.host):
            tell(first.text)

    def report_unexpected(self, error: BaseException) -> None:
        """Logs an error whose traceback Python will print, if there are other ranks that it ends."""
        if self._store is not None:
            self.report(f"{type(error).__name__}: {error}", 1, lambda text: logger.error("%s", text), error)

    def announce(self, text: str, code: int, *, hangs: bool = False) -> tuple[bool, RunEnd]:
        """Announces an error of this rank to the others; returns whether it is the first of the run, and the first."""
        named = f"rank {self._launch.rank} on {self._own.host}: {text}"
        mine = RunEnd(named, code, self._launch.rank, self._own.host, hangs=hangs)
        self._leaving = code
        if self._store is None:
            return True, mine  # there is one rank
        try:
            first = RunEnd.from_json(self._store.compare_set("end", "", mine.to_json()))
        except RuntimeError:  # the store is gone, and with it all other ranks
            return True, mine
        return first == mine, first

    def wait_for_cause(self, seconds: float = _GRACE_SECONDS + 2 * _BEAT_SECONDS) -> None:
        """Waits for the monitor to end this process, if an error of this rank is the consequence of another's end."""
        if self._store is not None:
            time.sleep(seconds)

    def _exchange(self, store: dist.Store) -> None:
        """Exchanges messages with the other ranks until the monitor is closed or the store is gone."""
        try:
            store.set(f"process/{self._launch.rank}", json.dumps(asdict(self._own)))
            while not self._stopped.is_set():
                self._exchange_once(store)
                self._stopped.wait(_BEAT_SECONDS if self._found is None else 0.0)
        except RuntimeError:  # torch's errors of the network
            self._broken = True

    def _exchange_once(self, store: dist.Store) -> None:
        self._beats += 1
        store.set(f"beat/{self._launch.rank}", str(self._beats))
        signs = progress.signs()
        self._signs = store.add("signs", signs - self._signs_sent)
        self._signs_sent = signs
        if not self._arrived and store.check([f"process/{self._next}"]):
            self._neighbour = RankProcess(**json.loads(store.get(f"process/{self._next}")))
            self._arrived = True
        if self._server is None and not agent_serves_store() and store.check(["process/0"]):
            self._server = RankProcess(**json.loads(store.get("process/0")))
        if store.check([f"beat/{self._next}"]):
            self._beat = store.get(f"beat/{self._next}")
        self._neighbour_done = store.check([f"done/{self._next}"])
        if self._found is not None:
            self._end = RunEnd.from_json(store.compare_set("end", "", self._found.to_json()))
        elif self._end is None and store.check(["end"]):
            self._end = RunEnd.from_json(store.get("end"))
            self._count_out(store)
        self._rounds += 1

    def _watch(self) -> None:
        """Watches the store and the next rank; ends this process if the run cannot go on."""
        rounds, beat, gone_since, signs = -1, b"", -1, -1
        store_silence, next_silence, since_end, hang = (SilenceTimer() for _ in range(4))
        started, named = time.monotonic(), False
        while not self._stopped.wait(_LOOK_SECONDS):
            if self._rounds != rounds:
                rounds = self._rounds
                store_silence.heard()
            if self._beat != beat or not self._arrived:
                beat = self._beat
                next_silence.heard()
            if self._signs != signs or not self._arrived:
                signs = self._signs
                hang.heard()
            if self._broken or store_silence.seconds() > self.silence_seconds:
                self._leave_without_store()
                return
            if self._end is None:
                since_end.heard()
            elif self._end.lost or (self._leaving is None and since_end.seconds() > _GRACE_SECONDS):
                self._leave(self._end)
            elif (
                self._found is not None and not self._found.hangs
            ):  # an error of this rank came first, and its end waits for the lost rank
                self._leave(self._found)
            if not self._arrived and not named and time.monotonic() - started > _LATE_SECONDS:
                named = True
                logger.warning("rank %d has not started yet; the other ranks wait for it", self._next)
            if not self._arrived or self._neighbour_done or self._found is not None:
                continue
            if hang.seconds() > self.hang_seconds:
                self._found = self._hang("no rank has made")
                continue
            gone_since = -1 if not self._neighbour.has_ended() else gone_since if gone_since >= 0 else rounds
            if gone_since >= 0 and rounds >= gone_since + 2:  # what it announced at its end has been read meanwhile
                self._found = self._lost("has ended without a word: it was killed or has crashed")
            elif next_silence.seconds() > self.silence_seconds:
                self._found = self._lost(
                    f"has given no sign of life for rollout.silence_seconds = {self.silence_seconds:g} s"
                )

    def _watch_alone(self) -> None:
        """Ends this process, the only rank, if it makes no progress."""
        signs, hang = -1, SilenceTimer()
        while not self._stopped.wait(_LOOK_SECONDS):
            if progress.signs() != signs:
                signs = progress.signs()
                hang.heard()
            elif hang.seconds() > self.hang_seconds:
                self._leave(self._hang("the run has made"))

    def _hang(self, who: str) -> RunEnd:
        text = (
            f"{who} progress for run.hang_seconds = {self.hang_seconds:g} s; the run ends. {stacks.DIRECTORY}/ in "
            "run.output has the stacks of all ranks. Run it again to resume from its last checkpoint"
        )
        return RunEnd(text, 1, self._launch.rank, self._own.host, hangs=True)

    def _lost(self, what: str) -> RunEnd:
        process = self._neighbour
        text = (
            f"rank {self._next} on {process.host} (process {process.pid}) {what}; the run ends on all ranks. Run it "
            "again to resume from its last checkpoint"
        )
        return RunEnd(text, 1, self._launch.rank, self._own.host, process)

    def _leave(self, end: RunEnd) -> None:
        """Ends this process, and the process of the lost rank if it is on this host."""
        code = end.code if self._leaving is None else self._leaving
        tells = end.told_by == self._launch.rank or (self._launch.rank == 0 and end.host != self._own.host)
        if tells and not self._leaving:  # else it has told its own error
            if end.code == 2:
                print(end.text, file=sys.stderr)
            else:
                logger.error("%s", end.text)
        if end.lost is not None or end.hangs:
            stacks.write_stacks(end.text)
        if end.lost is not None:
            end.lost.kill()
        _exit(code)

    def _leave_without_store(self) -> None:
        """Ends this process because the store does not answer any more."""
        if self._leaving is not None:
            if not self._broken:
                _exit(self._leaving)
            return  # the rank that served the store has ended first
        launch = self._launch
        what = "is gone" if self._broken else f"has not answered for {self.silence_seconds:g} s"
        logger.error(
            "rank %d on %s: the store of the run at %s, port %d %s: rank 0 or its torchrun was killed or stopped. Run "
            "it again to resume from its last checkpoint",
            *(launch.rank, self._own.host, launch.address, launch.port, what),
        )
        stacks.write_stacks("the store of the run does not answer")
        if self._server is not None:
            self._server.kill()
        _exit(1)

    def _say_goodbye(self, store: dist.Store) -> None:
        """Tells the other ranks that this one ends; the rank that serves the store waits for all others."""
        if self._leaving is None:
            self._leaving = 0
        store.set(f"done/{self._launch.rank}", "")
        left = self._count_out(store)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while self._launch.serves_store and left < self._launch.world_size and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS / 5)
            left = store.add("left", 0)

    def _count_out(self, store: dist.Store) -> int:
        """Counts this rank, once, among those that have ended or know that the run ends; returns their number."""
        more, self._counted = int(not self._counted), True
        return store.add("left", more)


def _exit(code: int) -> None:
    """Ends this process at once. Its threads may be inside a collective; the kernel kills what it has started."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
