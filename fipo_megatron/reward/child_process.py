"""A child process of a verifier as its parent sees it: messages over a socket, standard error, and its end.

asyncio's own subprocesses are not used: in Python 3.11 the wait for a process also waits until its pipes are closed,
which processes that it has forked, or a full pipe, can delay for ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from fipo_megatron.reward.child import encode_frame

_STDERR_BYTES = 8 << 10
_FRAME_BYTES = 1 << 20
_POLL_SECONDS = 0.005
_EXIT_SECONDS = 1.0
"""Seconds that a child may take to exit after it has closed its connection."""
_REAP_SECONDS = 5.0
"""Seconds that a killed child may take to disappear; a process in uninterruptible sleep is left behind."""


class _LastBytes(asyncio.Protocol):
    """Reads a pipe to its end and keeps its last bytes, so that the writer never waits."""

    def __init__(self) -> None:
        self.content = b""

    def data_received(self, data: bytes) -> None:
        self.content = (self.content + data)[-_STDERR_BYTES:]


class ChildProcess:
    """A running child (:mod:`.child`), the leader of its own process group. Made by :meth:`start`.

    Attributes:
        cpu_seconds: CPU seconds of the child at its last reply.
        killed: Whether :meth:`kill` was called.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._errors = _LastBytes()
        self._exit_code: int | None = None
        self.killed = False
        self.cpu_seconds = 0.0
        self._length: int | None = None
        """Bytes of the message whose header was read."""

    @classmethod
    async def start(
        cls, verifier: str, seconds: float, memory_mib: int, thinking_end: Sequence[str] = ()
    ) -> ChildProcess:
        """Starts a child; the first message that it sends says that it is ready.

        Raises:
            OSError: The process cannot be started.
        """
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "fipo_megatron.reward.child"),
                        *(verifier, str(seconds), str(memory_mib), str(os.getpid()), *thinking_end),
                    ],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        child = cls(process)
        try:
            ours.setblocking(False)
            child._reader, child._writer = await asyncio.open_unix_connection(sock=ours)
            loop = asyncio.get_running_loop()
            child._pipe, _ = await loop.connect_read_pipe(lambda: child._errors, process.stderr)
        except BaseException:
            child.kill()
            ours.close()
            raise
        return child

    async def receive(self) -> dict[str, Any]:
        """Returns the next message of the child; may be cancelled and called again.

        Raises:
            EOFError: The child has closed its connection.
            ConnectionError: The connection is broken.
            ValueError: The message is longer than 1 MiB, or is not a JSON object.
        """
        assert self._reader is not None
        if self._length is None:
            self._length = int.from_bytes(await self._reader.readexactly(4), "little")
        if self._length > _FRAME_BYTES:
            raise ValueError(f"its reply has {self._length} bytes")
        message = json.loads(await self._reader.readexactly(self._length))
        self._length = None
        if not isinstance(message, dict):
            raise ValueError("its reply is not an object")
        self.cpu_seconds = float(message["cpu_seconds"])
        return message

    def send(self, requests: Iterable[dict[str, Any]]) -> None:
        """Sends requests; the child replies to each in turn (:meth:`receive`)."""
        assert self._writer is not None
        self._writer.write(b"".join(map(encode_frame, requests)))

    @property
    def has_exited(self) -> bool:
        """Returns whether the process has ended. It is not reaped, so that its number stays that of its group."""
        if self._exit_code is not None:
            return True
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True

    @property
    def cpu_used(self) -> float:
        """Returns the CPU seconds since its last reply; 0 if the process is gone."""
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="utf-8", errors="replace") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
        except OSError:
            return 0.0
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") - self.cpu_seconds

    @property
    def standard_error(self) -> str:
        """Returns the last 8 KiB of the standard error."""
        return self._errors.content.decode(errors="replace")

    def kill(self) -> None:
        """Kills the process and its group, and closes the connection. Waits for nothing."""
        if not self.killed:
            self.killed = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._writer is not None:
            self._writer.transport.abort()

    async def end(self) -> int | None:
        """Lets the process end by itself for a moment if it has closed its connection, kills its group, and reaps it.

        Returns:
            Exit code, negative for a signal; None if it had to be killed here.
        """
        if self._exit_code is None:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + _EXIT_SECONDS
            closed = self._reader is not None and self._reader.at_eof()
            while closed and not self.killed and not self.has_exited and loop.time() < deadline:
                await asyncio.sleep(_POLL_SECONDS)
            by_itself = not self.killed and self.has_exited
            self.kill()  # also what it has forked
            await self._reap()
            await asyncio.sleep(_POLL_SECONDS)  # reads what is left of its standard error
            if self._pipe is not None:
                self._pipe.close()
            return self._exit_code if by_itself else None
        return self._exit_code

    async def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _REAP_SECONDS
        while (code := self._process.poll()) is None and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self._exit_code = -signal.SIGKILL if code is None else code


def describe_exit(code: int | None) -> str:
    """Describes the exit code of :meth:`ChildProcess.end`."""
    if code is None:
        return "closed its connection"
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}"
    return f"exited with code {code}"
