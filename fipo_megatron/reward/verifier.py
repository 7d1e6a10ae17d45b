"""Verifiers by name. An answer whose verifier dies or hangs is wrong and counted as a failure; the step goes on."""

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
from fipo_megatron.reward.child import encode_frame

_START_SECONDS = 120.0
_VALID = "math, exact, python:MODULE.FUNCTION, or a URL that begins with http: or https:"


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
        failure: Reason for a missing verdict, which counts as a wrong answer: ``timeout``, ``memory``, ``crash``,
            ``error`` or ``unreachable``; empty if there is a verdict.
    """

    correct: bool
    extracted: str | None = None
    failure: str = ""


class Verifier(Protocol):
    """Checks answers, many at a time."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of answers so far: ``verified``, and every kind of failure."""

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer. No content of an answer makes it raise."""

    async def close(self) -> None:
        """Ends the processes and connections of the verifier."""


def check_verifier(name: str) -> None:
    """Checks the name of a verifier without importing or starting anything.

    Raises:
        ValueError: The name is invalid; the message says what is valid.
    """
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
    """Returns the verifier that the configuration names. It starts processes with the first answer.

    Raises:
        ValueError: The name is invalid; see :func:`check_verifier`.
    """
    check_verifier(config.verifier)
    if config.verifier.startswith(("http:", "https:")):
        return HttpVerifier(config.verifier, config.verifier_processes, config.verifier_seconds)
    return ChildVerifier(
        config.verifier,
        config.verifier_processes,
        config.verifier_seconds,
        config.verifier_memory_mib,
        config.thinking_end,
    )


class _CountingVerifier:
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


class ChildVerifier(_CountingVerifier):
    """Checks in child processes, each bounded in CPU time, wall time and memory.

    Args:
        name: Name of the verifier; see :mod:`.child`.
        processes: Number of child processes, each with one answer at a time; other answers wait in order.
        seconds: CPU seconds for one answer. The limit of wall time is twice this plus one second, from when a child
            receives the answer.
        memory_mib: Address space of a child in MiB.
        thinking_end: End tags of thinking, ``reward.thinking_end``.
    """

    def __init__(
        self, name: str, processes: int, seconds: float, memory_mib: int, thinking_end: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._thinking_end = thinking_end
        self._name, self._seconds, self._memory = name, seconds, memory_mib
        self._idle: asyncio.LifoQueue[asyncio.subprocess.Process | None] = asyncio.LifoQueue()
        self._processes = processes
        for _ in range(processes):
            self._idle.put_nowait(None)  # started on demand

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer in an idle child; see :class:`Verifier`."""
        child = await self._idle.get()
        try:
            if child is None or child.returncode is not None:
                child = await self._start()
            verdict = await self._request(child, answer)
            if verdict.failure in ("timeout", "crash", "memory"):
                await _kill(child)
                child = None
            return self._counted(verdict)
        except BaseException:
            if child is not None:
                await _kill(child)
                child = None
            raise
        finally:
            self._idle.put_nowait(child)

    async def _start(self) -> asyncio.subprocess.Process:
        """Starts a child and waits until it is ready.

        Raises:
            RuntimeError: The child does not start; the message holds the end of its stderr.
        """
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fipo_megatron.reward.child"),
            *(self._name, str(self._seconds), str(self._memory), *self._thinking_end),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _read_frame(child)
        except (TimeoutError, EOFError):
            await _kill(child)
            assert child.stderr is not None
            output = (await child.stderr.read())[-2000:].decode(errors="replace")
            raise RuntimeError(f"reward.verifier = {self._name}: its process does not start:\n{output}") from None
        return child

    async def _request(self, child: asyncio.subprocess.Process, answer: Answer) -> Verdict:
        assert child.stdin is not None
        try:
            async with asyncio.timeout(2 * self._seconds + 1):
                child.stdin.write(encode_frame({"response": answer.response, "ground_truth": answer.ground_truth}))
                await child.stdin.drain()
                reply = await _read_frame(child)
        except TimeoutError:
            return Verdict(False, failure="timeout")
        except (EOFError, ConnectionError):
            code = await child.wait()
            return Verdict(False, failure="timeout" if code == -signal.SIGXCPU else "crash")
        return Verdict(reply["correct"], reply["extracted"], reply["failure"])

    async def close(self) -> None:
        """Kills all children; see :class:`Verifier`."""
        for _ in range(self._processes):
            child = await self._idle.get()
            if child is not None:
                await _kill(child)


async def _read_frame(child: asyncio.subprocess.Process) -> dict[str, Any]:
    assert child.stdout is not None
    header = await child.stdout.readexactly(4)
    message: dict[str, Any] = json.loads(await child.stdout.readexactly(int.from_bytes(header, "little")))
    return message


async def _kill(child: asyncio.subprocess.Process) -> None:
    """Kills a child and its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        child.stdin.close()
    await child.wait()


class HttpVerifier(_CountingVerifier):
    """Checks with a service: POST of ``prompt``, ``response``, ``ground_truth`` and ``data_source`` as JSON.

    The service replies ``{"correct": true}`` or ``{"score": 1.0}``; a score above 0 is right. An optional
    ``"extracted"`` is the text that it took for the answer.

    Args:
        url: URL of the service.
        concurrency: Number of answers at a time.
        seconds: Time limit of one request in seconds.
        attempts: Number of requests per answer if the service fails.
    """

    def __init__(self, url: str, concurrency: int, seconds: float, attempts: int = 3) -> None:
        super().__init__()
        self._url, self._attempts = url, attempts
        self._timeout = aiohttp.ClientTimeout(total=seconds)
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def verify(self, answer: Answer) -> Verdict:
        """Checks one answer, with retries if the service fails; see :class:`Verifier`."""
        async with self._slots:
            for attempt in range(self._attempts):
                verdict = await self._request(answer)
                if not verdict.failure:
                    break
                await asyncio.sleep(0.1 * 2**attempt)
        return self._counted(verdict)

    async def _request(self, answer: Answer) -> Verdict:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        payload = {
            "prompt": answer.prompt,
            "response": answer.response,
            "ground_truth": answer.ground_truth,
            "data_source": answer.data_source,
        }
        try:
            async with self._session.post(self._url, json=payload) as reply:
                if reply.status != 200:
                    return Verdict(False, failure="error")
                content = await reply.json(content_type=None)
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
        """Closes the connections; see :class:`Verifier`."""
        if self._session is not None:
            await self._session.close()
