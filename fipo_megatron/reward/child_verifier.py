"""A verifier in child processes. An answer whose child dies, hangs or fails has no verdict; the step goes on."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

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


class ChildVerifier(CountingVerifier):
    """Checks in child processes, each bounded in CPU time, wall time and memory.

    Args:
        name: Name of the verifier; see :mod:`.child`.
        processes: Number of child processes, each with one answer at a time; other answers wait in order.
        seconds: CPU seconds for one answer; an answer that needs more is wrong. The limit of wall time is twice this
            plus one second, from when a child receives the answer; beyond it the check has failed.
        memory_mib: Address space of a child in MiB.
    """

    def __init__(
        self, name: str, processes: int, seconds: float, memory_mib: int, thinking_end: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._thinking_end = tuple(thinking_end)
        self._name, self._seconds, self._memory = name, seconds, memory_mib
        self._wall_seconds = 2 * seconds + 1
        self._idle: asyncio.LifoQueue[ChildProcess | None] = asyncio.LifoQueue()
        self._children: set[ChildProcess] = set()
        self._crashes = 0
        self._closed = False
        for _ in range(processes):
            self._idle.put_nowait(None)  # started on demand

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer in an idle child; see :class:`Verifier`."""
        child = await self._idle.get()
        try:
            self._check_open()
            if child is not None and child.has_exited:
                await self._end(child)
                child = None
            if child is None:
                child = await self._start()
            verdict, usable = await self._check(child, answer)
            if not usable:
                await self._end(child)
                child = None
            return self._counted(verdict)
        except BaseException:
            if child is not None:
                child.kill()
                await self._end(child)
                child = None
            raise
        finally:
            self._idle.put_nowait(child)

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

    async def _check(self, child: ChildProcess, answer: Answer) -> tuple[Verdict, bool]:
        """Returns the verdict of a child, and whether the child can check another answer."""
        wall = self._wall_seconds
        try:
            async with asyncio.timeout(wall):
                reply = await child.request({"response": answer.response, "ground_truth": answer.ground_truth})
        except TimeoutError:
            if child.cpu_used >= self._seconds:
                return self._over_cpu_limit(), False
            return Verdict(False, failure="timeout", detail=f"{self._name}: no verdict within {wall:g} s"), False
        except (EOFError, ConnectionError, ValueError) as error:
            code = await self._end(child)
            if code == -signal.SIGXCPU:
                return self._over_cpu_limit(), False
            reason = f"sent no verdict: {error}" if isinstance(error, ValueError) else describe_exit(code)
            return self._crashed(f"{self._name}: its process {reason}", child), False
        self._crashes = 0
        verdict = Verdict(reply["correct"], reply["extracted"], reply["failure"], reply["detail"])
        if verdict.failure:
            verdict = Verdict(False, None, verdict.failure, f"{self._name}: {verdict.detail}")
        return verdict, verdict.failure != "memory" and not reply["last"]

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
