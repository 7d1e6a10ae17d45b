"""Verifiers by name. A verifier that dies or hangs costs one wrong answer and a count, never the step."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlparse

import aiohttp

from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.child import framed

_START_SECONDS = 120.0
_VALID = "math, exact, python:MODULE.FUNCTION, or a URL that begins with http: or https:"


@dataclass(frozen=True)
class Answer:
    """What is checked.

    Attributes:
        response: The whole text.
        ground_truth: The right answer.
        prompt: What was asked.
        data_source: The data set that it comes from.
    """

    response: str
    ground_truth: str
    prompt: str = ""
    data_source: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says.

    Attributes:
        correct: Whether the answer is right.
        extracted: What was taken for the answer, where the verifier says so.
        failure: Why there is no verdict, and the answer counts as wrong: ``timeout``, ``memory``, ``crash``, ``error``
            or ``unreachable``; empty where there is one.
    """

    correct: bool
    extracted: str | None = None
    failure: str = ""


class Verifier(Protocol):
    """Checks answers, many at a time."""

    @property
    def counts(self) -> Mapping[str, int]:
        """``verified``, and every kind of failure, so far."""

    async def verify(self, answer: Answer) -> Verdict:
        """Never raises because of what an answer says."""

    async def close(self) -> None:
        """Ends what the verifier has started."""


def check_verifier(name: str) -> None:
    """Raises ValueError that says what would be valid; imports nothing, starts nothing."""
    if name in ("math", "exact"):
        return
    if name.startswith("python:"):
        module, _, function = name.removeprefix("python:").rpartition(".")
        with contextlib.suppress(ImportError, ValueError):
            if function.isidentifier() and module and importlib.util.find_spec(module) is not None:
                return
        raise ValueError(f"reward.verifier = {name}: there is no module {module!r} to import; valid: {_VALID}")
    if name.startswith(("http:", "https:")) and urlparse(name).netloc:
        return
    raise ValueError(f"reward.verifier = {name}: must be {_VALID}")


def open_verifier(config: RewardConfig) -> Verifier:
    """The verifier that the configuration names; it starts what it needs with the first answer.

    Raises:
        ValueError: see :func:`check_verifier`.
    """
    check_verifier(config.verifier)
    if config.verifier.startswith(("http:", "https:")):
        return HttpVerifier(config.verifier, config.verifier_processes, config.verifier_seconds)
    return ChildVerifier(
        config.verifier, config.verifier_processes, config.verifier_seconds, config.verifier_memory_mib
    )


class _Counting:
    """What all verifiers count."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter(verified=0)

    @property
    def counts(self) -> Mapping[str, int]:
        """See :class:`Verifier`."""
        return dict(self._counts)

    def _counted(self, verdict: Verdict) -> Verdict:
        self._counts["verified"] += 1
        if verdict.failure:
            self._counts[verdict.failure] += 1
        return verdict


class ChildVerifier(_Counting):
    """Checks in child processes, each bounded in CPU time, wall time and memory.

    Args:
        name: Of the verifier; see :mod:`.child`.
        processes: Children, and answers at a time; others wait in order.
        seconds: CPU time for one answer; twice that of wall time, from when a child begins with it.
        memory_mib: Address space of a child.
    """

    def __init__(self, name: str, processes: int, seconds: float, memory_mib: int) -> None:
        super().__init__()
        self._name, self._seconds, self._memory = name, seconds, memory_mib
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        self._processes = processes
        for _ in range(processes):
            self._idle.put_nowait(None)  # started when it is needed

    async def verify(self, answer: Answer) -> Verdict:
        """See :class:`Verifier`."""
        child = await self._idle.get()
        try:
            if child is None or child.returncode is not None:
                child = await self._start()
            verdict = await self._ask(child, answer)
            if verdict.failure in ("timeout", "crash", "memory"):
                await _end(child)
                child = None
            return self._counted(verdict)
        except BaseException:
            if child is not None:
                await _end(child)
                child = None
            raise
        finally:
            self._idle.put_nowait(child)

    async def _start(self) -> asyncio.subprocess.Process:
        """A child that is ready.

        Raises:
            RuntimeError: it cannot be started at all, with what it said.
        """
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fipo_megatron.reward.child"),
            *(self._name, str(self._seconds), str(self._memory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _read(child)
        except (TimeoutError, EOFError):
            await _end(child)
            assert child.stderr is not None
            said = (await child.stderr.read())[-2000:].decode(errors="replace")
            raise RuntimeError(f"reward.verifier = {self._name}: its process does not start:\n{said}") from None
        return child

    async def _ask(self, child: asyncio.subprocess.Process, answer: Answer) -> Verdict:
        assert child.stdin is not None
        try:
            async with asyncio.timeout(2 * self._seconds + 1):
                child.stdin.write(framed({"response": answer.response, "ground_truth": answer.ground_truth}))
                await child.stdin.drain()
                found = await _read(child)
        except TimeoutError:
            return Verdict(False, failure="timeout")
        except (EOFError, ConnectionError):
            code = await child.wait()
            return Verdict(False, failure="timeout" if code == -signal.SIGXCPU else "crash")
        return Verdict(found["correct"], found["extracted"], found["failure"])

    async def close(self) -> None:
        """See :class:`Verifier`."""
        for _ in range(self._processes):
            child = await self._idle.get()
            if child is not None:
                await _end(child)


async def _read(child: asyncio.subprocess.Process) -> dict[str, Any]:
    assert child.stdout is not None
    header = await child.stdout.readexactly(4)
    found: dict[str, Any] = json.loads(await child.stdout.readexactly(int.from_bytes(header, "little")))
    return found


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ends a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        child.stdin.close()
    await child.wait()


class HttpVerifier(_Counting):
    """Asks a service: POST of ``prompt``, ``response``, ``ground_truth`` and ``data_source``.

    It answers ``{"correct": true}`` or ``{"score": 1.0}``, which is right above 0; beside it there may be
    ``"extracted"``: what it took for the answer.

    Args:
        url: Of the service.
        concurrency: Answers at a time.
        seconds: For one answer.
        attempts: How often an answer is sent where the service fails.
    """

    def __init__(self, url: str, concurrency: int, seconds: float, attempts: int = 3) -> None:
        super().__init__()
        self._url, self._attempts = url, attempts
        self._timeout = aiohttp.ClientTimeout(total=seconds)
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def verify(self, answer: Answer) -> Verdict:
        """See :class:`Verifier`."""
        async with self._slots:
            for attempt in range(self._attempts):
                verdict = await self._ask(answer)
                if not verdict.failure:
                    break
                await asyncio.sleep(0.1 * 2**attempt)
        return self._counted(verdict)

    async def _ask(self, answer: Answer) -> Verdict:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        payload = {
            "prompt": answer.prompt,
            "response": answer.response,
            "ground_truth": answer.ground_truth,
            "data_source": answer.data_source,
        }
        try:
            async with self._session.post(self._url, json=payload) as found:
                if found.status != 200:
                    return Verdict(False, failure="error")
                content = await found.json(content_type=None)
        except TimeoutError:
            return Verdict(False, failure="timeout")
        except (aiohttp.ClientError, OSError):
            return Verdict(False, failure="unreachable")
        except ValueError:
            return Verdict(False, failure="error")
        value = content.get("correct", content.get("score")) if isinstance(content, dict) else None
        if not isinstance(value, bool | int | float):
            return Verdict(False, failure="error")
        extracted = content.get("extracted")
        return Verdict(value > 0, extracted if isinstance(extracted, str) else None)

    async def close(self) -> None:
        """See :class:`Verifier`."""
        if self._session is not None:
            await self._session.close()
