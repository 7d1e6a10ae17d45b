"""SIGTERM, SIGUSR1 and Ctrl-C: the first asks the run to end after its step, the second ends the process at once.

The file :data:`STOP_FILE` in ``run.output`` asks for the same. Unlike a signal, it reaches no other process, and it is
not lost while the run starts.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from fipo_megatron.actor.launch import shutdown_seconds

logger = logging.getLogger(__name__)
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to end; Slurm often sends SIGUSR1 before a time limit."""
STOP_FILE = "stop"
"""Name of the file in ``run.output`` that asks a run to end after its step, which removes the file."""
_TWICE_SECONDS = 5.0
"""Seconds in which a signal may arrive twice under torchrun or Slurm: from Slurm, which sends it to all processes of a
step, and from torchrun or srun, which passes it on."""


class StopSignals:
    """Records the signals :data:`HANDLED` while its block runs and restores the earlier handlers after it.

    Attributes:
        requested: Whether this process was asked to end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[int, Any] = {}
        self._seconds_left = shutdown_seconds(os.environ)
        self._may_come_twice = self._seconds_left is not None or "SLURM_STEP_ID" in os.environ
        self._warned = False
        self._requested_at = 0.0

    def __enter__(self) -> StopSignals:
        for signum in HANDLED:
            self._earlier[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def check_time(self, step_seconds: float) -> None:
        """Warns once if torchrun would kill this process before a step of this length has ended."""
        if self._seconds_left is None or step_seconds <= self._seconds_left or self._warned:
            return
        self._warned = True
        logger.warning(
            "a step takes %.0f s, and torchrun kills its ranks %g s after a signal: a run that is asked to end is not "
            "saved. Start torchrun with a larger --shutdown-timeout",
            *(step_seconds, self._seconds_left),
        )

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            if self._may_come_twice and time.monotonic() - self._requested_at < _TWICE_SECONDS:
                return
            os._exit(128 + signum)
        self.requested, self._requested_at = True, time.monotonic()
        limit = "" if self._seconds_left is None else f"; torchrun kills this rank after {self._seconds_left:g} s"
        logger.warning(
            "%s: the run ends after this step; once more ends it at once%s", signal.Signals(signum).name, limit
        )
