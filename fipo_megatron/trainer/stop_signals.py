"""SIGTERM and Ctrl-C: the first asks the run to end after its step, the second ends the process at once."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class StopSignals:
    """Records SIGINT and SIGTERM while its block runs and restores the earlier handlers after it.

    Attributes:
        requested: Whether this process was asked to end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._earlier[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + signum)
        self.requested = True
        logger.warning("%s: the run ends after this step; once more ends it at once", signal.Signals(signum).name)
