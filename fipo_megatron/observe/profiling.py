"""Writes torch profiler traces of selected steps (``run.profile``), with the names of the parts of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from fipo_megatron.storage.atomic import partial_of

logger = logging.getLogger(__name__)

_profiling = False


def span(name: str) -> AbstractContextManager[Any]:
    """Returns a block that appears under this name in the trace of a profiled step; costs nothing in other steps."""
    return record_function(name) if _profiling else nullcontext()


class StepProfiler:
    """Profiles selected steps on this rank.

    Args:
        steps: Numbers of the steps; empty on ranks that are not profiled.
        directory: Directory of the traces; it is created with the first one.
        rank: Number of this rank.
    """

    def __init__(self, steps: Collection[int], directory: Path, rank: int) -> None:
        self._steps, self._directory, self._rank = frozenset(steps), directory, rank
        self._profile: profile | None = None
        self._step = -1
        self._pauses: list[Callable[[], AbstractContextManager[None]]] = []

    def pause_with(self, pause: Callable[[], AbstractContextManager[None]]) -> None:
        """Registers a thread that must stand still while a profile ends.

        PyTorch frees the records of all threads when a profile ends, without waiting for an operation that another
        thread is recording; the process then dies of SIGSEGV. PyTorch 2.13 has this fault (pytorch/pytorch#187483).

        Args:
            pause: Returns a block in which that thread runs no PyTorch operation.
        """
        self._pauses.append(pause)

    def begin(self, step: int) -> None:
        """Starts to profile if the step is selected; drops the profile of a step that was not finished."""
        self.close()
        if step not in self._steps:
            return
        global _profiling
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        # The engine and the senders of weights work in threads of their own.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=activities, experimental_config=threads)
        self._profile.start()
        _profiling, self._step = True, step

    def end(self) -> None:
        """Writes the trace of the step that is being profiled; a file that cannot be written is a warning."""
        found = self.close()
        if found is None:
            return
        target = self._directory / f"step-{self._step:06}-rank-{self._rank:04}.json.gz"
        partial = partial_of(target).with_suffix(".gz")  # the profiler compresses by the ending
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(partial))
            partial.replace(target)
        except OSError as error:
            logger.warning("the profile of step %d is not written: %s", self._step, error)
            return
        if self._rank == 0:
            logger.info("the profile of step %d is in %s", self._step, target)

    def close(self) -> profile | None:
        """Ends profiling; returns the profile of the step, if there is one, without writing it."""
        global _profiling
        found, self._profile, _profiling = self._profile, None, False
        if found is not None:
            with ExitStack() as pauses:
                for pause in self._pauses:
                    pauses.enter_context(pause())
                found.stop()
        return found
