"""A verifier in child processes. An answer whose child dies, hangs or fails has no verdict; the step goes on."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.reward.child_process import ChildProcess, describe_exit
from fipo_megatron.reward.verifier_protocol import Answer, CountingVerifier, Verdict

logger = logging.getLogger(__name__)
_START_SECONDS = 120.0
_STARTS = 3
"""Times that a child may be killed while it starts."""
_CRASHES = 20
"""Answers in a row on which a child may crash before the verifier counts as broken."""
_OUTPUT_CHARACTERS = 2000
_MESSAGE_SECONDS = 0.005
"""CPU seconds that the answers of one message should take.

Each is assumed to take as long as the slowest of late, so that few answers wait behind a slow one.
"""
_DECAY = 0.95
"""Decay of the CPU seconds of the slowest answer, per answer."""
_STANDSTILL_SECONDS = 0.1
"""Delay of a timer from which the event loop counts as having stood still."""
_MESSAGE_CHARACTERS = 1 << 18
"""Characters of the responses of a message; the last one may exceed it."""


@dataclass(eq=False)
class _Check:
    """An answer and its verdict to come.

    Attributes:
        answer: The answer.
        verdict: Set when the check has ended; cancelled if nobody waits for it any more.
        child: The child that checks the answer now.
    """

    answer: Answer
    verdict: asyncio.Future[Verdict]
    child: ChildProcess | None = None


class ChildVerifier(CountingVerifier):
    """Checks in child processes, each bounded in CPU time, wall time and memory.

    Answers wait in order. A child gets several in one message if checks are short, and checks them one after the other.
    The first slow one after many short ones may delay those behind it in its message.

    Args:
        name: Name of the verifier; see :mod:`.child`.
        processes: Number of child processes.
        seconds: CPU seconds for one answer; an answer that needs more is wrong. The limit of wall time is twice this
            plus one second, from when a child begins with the answer; beyond it the check has failed.
        memory_mib: Address space of a child in MiB.
        thinking_end: End tags of thinking.
    """

    def __init__(
        self, name: str, processes: int, seconds: float, memory_mib: int, thinking_end: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._thinking_end = tuple(thinking_end)
        self._name, self._seconds, self._memory = name, seconds, memory_mib
        self._wall_seconds = 2 * seconds + 1
        self._waiting: deque[_Check] = deque()
        self._idle: list[ChildProcess | None] = [None] * processes  # None is started on demand
        self._workers: set[asyncio.Task[None]] = set()
        self._children: set[ChildProcess] = set()
        self._seconds_per_check: float | None = None
        """CPU seconds of the slowest answer of late; None before the first."""
        self._crashes = 0
        self._closed = False

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer; see :class:`Verifier`. If it is cancelled, the child that is checking it is killed."""
        self._check_open()
        check = _Check(answer, asyncio.get_running_loop().create_future())
        self._waiting.append(check)
        self._start_worker()
        try:
            return self._counted(await check.verdict)
        except asyncio.CancelledError:
            if check.child is not None:
                check.child.kill()
                await self._end(check.child)
            raise

    def _start_worker(self) -> None:
        """Lets an idle child check answers that wait, if there is an idle one; prefers one that is running."""
        if not self._idle:
            return
        child = next((one for one in reversed(self._idle) if one is not None), None)
        self._idle.remove(child)
        worker = asyncio.create_task(self._work(child))
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _work(self, child: ChildProcess | None) -> None:
        """Lets a child check answers while any are waiting; starts it first if there is none, or if it has exited."""
        checks: list[_Check] = []
        try:
            while self._waiting:
                try:
                    self._check_open()
                    if child is not None and child.has_exited:
                        await self._end(child)
                        child = None
                    if child is None:
                        child = await self._start()
                    checks = self._take()  # not before: another child may be idle while this one starts
                    if checks:
                        child = await self._check(child, checks)
                except Exception as error:
                    if child is not None:
                        child.kill()
                        await self._end(child)
                        child = None
                    for check in checks or self._take():
                        if not check.verdict.done():
                            check.verdict.set_exception(error)
                checks = []
        finally:
            self._idle.append(child)

    def _take(self) -> list[_Check]:
        """Takes the next answers for a child: no more than its share, and than it should check in 5 ms."""
        waiting = deque(check for check in self._waiting if not check.verdict.done())
        share = math.ceil(len(waiting) / len(self._workers))
        slowest = _MESSAGE_SECONDS if self._seconds_per_check is None else self._seconds_per_check
        most = min(share, max(1, int(_MESSAGE_SECONDS / max(slowest, 1e-6))))
        taken: list[_Check] = []
        characters = 0
        while waiting and len(taken) < most and characters < _MESSAGE_CHARACTERS:
            taken.append(check := waiting.popleft())
            characters += len(check.answer.response)
        self._waiting = waiting
        return taken

    async def _check(self, child: ChildProcess, checks: Sequence[_Check]) -> ChildProcess | None:
        """Lets a child check answers. What it has not checked when it ends is put back.

        Returns:
            The child; None if it has ended.

        Raises:
            VerifierError: Children have crashed on too many answers in a row.
        """
        answers = (check.answer for check in checks)
        child.send({"response": answer.response, "ground_truth": answer.ground_truth} for answer in answers)
        for number, check in enumerate(checks):
            if check.verdict.done():  # cancelled: it may take long
                child.kill()
            before, check.child = child.cpu_seconds, child
            verdict, usable = await self._receive(child)
            check.child = None
            if not usable:
                await self._end(child)
                self._put_back(checks[number + (verdict is not None) :])
            else:
                slowest = _DECAY * (self._seconds_per_check or 0.0)
                self._seconds_per_check = max(child.cpu_seconds - before, slowest)
            if verdict is not None and not check.verdict.done():
                check.verdict.set_result(verdict)
            if not usable:
                return None
        return child

    def _put_back(self, checks: Sequence[_Check]) -> None:
        """Lets answers wait again, before all others, and wakes idle children for them."""
        left = [check for check in checks if not check.verdict.done()]
        self._waiting.extendleft(reversed(left))
        for _ in left:
            self._start_worker()

    def _check_open(self) -> None:
        if self._closed:
            raise VerifierError(f"reward.verifier = {self._name}: is closed")

    async def _start(self) -> ChildProcess:
        """Starts a child and waits until it is ready; starts another if it is killed meanwhile.

        Raises:
            VerifierError: The child does not start; the message holds the end of its stderr.
        """
        for attempt in range(1, _STARTS + 1):
            child = await ChildProcess.start(self._name, self._seconds, self._memory, self._thinking_end)
            self._children.add(child)
            try:
                self._check_open()
                async with asyncio.timeout(_START_SECONDS):
                    await child.receive()
                return child
            except (TimeoutError, EOFError, ConnectionError, ValueError) as error:
                code = await self._end(child)
                late = isinstance(error, TimeoutError)
                reason = f"was not ready after {_START_SECONDS:g} s" if late else describe_exit(code)
                text = f"reward.verifier = {self._name}: its process does not start: it {reason}"
                output = child.standard_error[-_OUTPUT_CHARACTERS:].strip()
                killed = code is not None and code < 0
                if not killed or attempt == _STARTS:
                    times = f" {attempt} times in a row" if attempt > 1 else ""
                    raise VerifierError(f"{text}{times}\n{output}".rstrip()) from None
                logger.warning("%s; it is started again", text)
            except BaseException:
                child.kill()
                await self._end(child)
                raise
        raise AssertionError("unreachable")

    async def _receive(self, child: ChildProcess) -> tuple[Verdict | None, bool]:
        """Returns the next verdict of a child, and whether the child can check another answer.

        The verdict is None if a cancellation has killed the child.
        """
        wall = self._wall_seconds
        try:
            reply = await self._reply(child)
        except TimeoutError:
            if child.cpu_used >= self._seconds:
                return self._over_cpu_limit(), False
            return Verdict(False, failure="timeout", detail=f"{self._name}: no verdict within {wall:g} s"), False
        except (EOFError, ConnectionError, ValueError) as error:
            cancelled = child.killed and not self._closed
            code = await self._end(child)
            if cancelled:
                return None, False
            if code == -signal.SIGXCPU:
                return self._over_cpu_limit(), False
            reason = f"sent no verdict: {error}" if isinstance(error, ValueError) else describe_exit(code)
            return self._crashed(f"{self._name}: its process {reason}", child), False
        self._crashes = 0
        verdict = Verdict(reply["correct"], reply["extracted"], reply["failure"], reply["detail"])
        if verdict.failure:
            verdict = Verdict(False, None, verdict.failure, f"{self._name}: {verdict.detail}")
        return verdict, verdict.failure != "memory" and not reply["last"]

    async def _reply(self, child: ChildProcess) -> dict[str, Any]:
        """Returns the next reply of a child. Time in which the event loop stood still is not counted.

        Raises:
            TimeoutError: There is none within the limit of wall time.
        """
        loop, seconds = asyncio.get_running_loop(), self._wall_seconds
        while True:
            deadline = loop.time() + seconds
            try:
                async with asyncio.timeout_at(deadline):
                    return await child.receive()
            except TimeoutError:
                seconds = loop.time() - deadline
                if seconds < _STANDSTILL_SECONDS:
                    raise

    def _over_cpu_limit(self) -> Verdict:
        """Returns the verdict on an answer that took too much CPU time: it is wrong."""
        self._crashes = 0
        self._counts["cpu_limit"] += 1
        if self._counts["cpu_limit"] == 1:
            logger.warning(
                "reward.verifier = %s: an answer took more than reward.verifier_seconds = %g s of CPU time; such "
                "answers count as wrong",
                self._name,
                self._seconds,
            )
        return Verdict(False)

    def _crashed(self, text: str, child: ChildProcess) -> Verdict:
        """Returns the failure of a check whose child crashed.

        Raises:
            VerifierError: Children have crashed on too many answers in a row.
        """
        output = child.standard_error[-_OUTPUT_CHARACTERS:].strip()
        detail = f"{text}\n{output}".rstrip()
        self._crashes += 1
        if self._crashes >= _CRASHES and not self._closed:
            raise VerifierError(f"reward.verifier = {detail}\n{self._crashes} answers in a row ended like this")
        return Verdict(False, failure="crash", detail=detail)

    async def _end(self, child: ChildProcess) -> int | None:
        self._children.discard(child)
        return await child.end()

    async def close(self) -> None:
        """Kills all children, also those that are checking or starting; see :class:`Verifier`."""
        self._closed = True
        children = list(self._children)
        for child in children:
            child.kill()
        await asyncio.gather(*(self._end(child) for child in children))
        await asyncio.gather(*self._workers)
