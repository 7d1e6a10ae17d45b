"""The process of a rank, as other ranks of its host can recognise it."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fipo_megatron.trainer.stacks import FORCED

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STACKS_SECONDS = 0.5
_ENDED = "ZX"
"""States of a process that has ended but was not waited for."""


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank.

    Attributes:
        host: Name of its host.
        pid: Number of the process.
        started: Start of the process in clock ticks since the start of its host; with it the number is unique.
        namespace: Host and namespace in which the number is valid.
    """

    host: str
    pid: int
    started: int
    namespace: str

    @classmethod
    def own(cls) -> RankProcess:
        """Returns this process."""
        started = 0
        with suppress(OSError):  # a system without /proc: no process recognises another one
            _, started = _state_and_start(os.getpid())
        return cls(socket.gethostname(), os.getpid(), started, _namespace())

    @property
    def is_here(self) -> bool:
        """Whether this process sees that one."""
        return bool(self.namespace) and self.namespace == _namespace()

    def has_ended(self) -> bool:
        """Returns whether the process is known to have ended; False for a process of another host."""
        if not self.is_here:
            return False
        try:
            state, started = _state_and_start(self.pid)
        except OSError:
            return True
        return state in _ENDED or started != self.started

    def kill(self) -> None:
        """Kills the process if it is on this host; a stopped process would stay for ever.

        It has a moment to write its stacks before (:mod:`.trainer.stacks`), for which a stopped process must go on.
        """
        if self.is_here and not self.has_ended():
            with suppress(OSError):
                os.kill(self.pid, FORCED)
                os.kill(self.pid, signal.SIGCONT)
                time.sleep(_STACKS_SECONDS)
                os.kill(self.pid, signal.SIGKILL)


def _state_and_start(pid: int) -> tuple[str, int]:
    """Returns the state and the start of a process.

    Raises:
        OSError: There is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _namespace() -> str:
    """Returns the boot of this host and the namespace of its process numbers; empty if the system does not tell."""
    with suppress(OSError):
        return f"{_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
