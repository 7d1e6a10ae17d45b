"""Console output of a run: log lines, a line per step, and the progress of sampling.

On a terminal it has colours and a live progress bar, otherwise plain lines. Only the first rank prints all of it; the
other ranks print warnings and errors with their rank.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from fipo_megatron.rollout.sampling_progress import ProgressSnapshot

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 30.0
"""Seconds between two progress lines without a terminal."""
_HEADER_EVERY = 20

COLUMNS = (
    ("accuracy", "rollout/accuracy", "{:.3f}", 8),
    ("reward", "rollout/reward", "{:+.3f}", 7),
    ("length", "rollout/response_tokens_mean", "{:.1f}", 8),
    ("loss", "policy/loss", "{:+.4f}", 8),
    ("grad", "optimizer/grad_norm", "{:.3g}", 7),
    ("KL", "policy/policy_kl", "{:.2e}", 9),
    ("f", "future_kl/weight_mean", "{:.4f}", 7),
    ("entropy", "policy/entropy", "{:.3f}", 7),
)
"""Columns of the line per step: title, tag, format and width."""


def set_up_logging(rank: int, *, plain: bool) -> Console | None:
    """Sends log lines of this process to stderr: from INFO on rank 0, from WARNING elsewhere, with the rank.

    Returns:
        The terminal of rank 0; None on other ranks, without a terminal, or if ``plain``.
    """
    level = logging.WARNING if rank else logging.INFO
    console = Console(stderr=True) if not rank and not plain and sys.stderr.isatty() else None
    if console is None:
        logging.basicConfig(format=f"%(asctime)s rank {rank} %(levelname)s %(message)s", level=level, force=True)
    else:
        handler = RichHandler(console=console, show_path=False, markup=False, log_time_format="%H:%M:%S")
        logging.basicConfig(format="%(message)s", level=level, handlers=[handler], force=True)
    return console


class StepLines:
    """Prints an aligned line per step, and a header at regular intervals."""

    def __init__(self) -> None:
        self._written = 0

    def say(self, step: int, of: int, values: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Prints the line of a step.

        Args:
            step: Number of the step.
            of: Steps of the run.
            values: Metrics by tag.
            seconds: Seconds by part, and ``step`` for the whole, which is shown first; parts that round to 0.0 are left
                out.
        """
        columns = [column for column in COLUMNS if column[1] in values]
        width = len(str(of))
        if self._written % _HEADER_EVERY == 0:
            titles = "  ".join(title.rjust(size) for title, _, _, size in columns)
            logger.info("%s  %s  seconds", "step".rjust(2 * width + 1), titles)
        self._written += 1
        cells = [
            (form.format(values[tag]) if values[tag] is not None else "–").rjust(size) for _, tag, form, size in columns
        ]
        missing, groups = values.get("rollout/groups_missing"), values.get("rollout/groups", 0)
        smaller = [f"{groups} of {groups + missing} groups"] if missing else []
        parts = [f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05 and name != "step"]
        total = f"{seconds['step']:.1f}".rjust(len("seconds")) if "step" in seconds else ""
        logger.info(
            "%s/%d  %s  %s", str(step).rjust(width), of, "  ".join(cells), "  ".join([total, *parts, *smaller]).rstrip()
        )


@contextmanager
def show_sampling_progress(
    console: Console | None, ask: Callable[[], ProgressSnapshot | None] | None
) -> Iterator[None]:
    """Shows the progress of sampling while the block runs.

    Args:
        console: Terminal for a progress bar; None: a log line every half minute.
        ask: Function that returns the present progress; None: nothing is shown.
    """
    if ask is None:
        yield
        return
    ended = threading.Event()
    show = _log_lines if console is None else _progress_bar(console)
    thread = threading.Thread(target=show, args=(ended, ask), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log_lines(ended: threading.Event, ask: Callable[[], ProgressSnapshot | None]) -> None:
    start = time.monotonic()
    while not ended.wait(_QUIET_SECONDS):
        if (now := ask()) is not None:
            logger.info("sampling: %s", describe(now, time.monotonic() - start))


def _progress_bar(console: Console) -> Callable[[threading.Event, Callable[[], ProgressSnapshot | None]], None]:
    def show(ended: threading.Event, ask: Callable[[], ProgressSnapshot | None]) -> None:
        start = time.monotonic()
        columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None, now="")
            while not ended.wait(0.25):
                if (now := ask()) is not None:
                    text = describe(now, time.monotonic() - start)
                    progress.update(task, total=now.begun or None, completed=now.done, now=text)

    return show


def describe(now: ProgressSnapshot, seconds: float) -> str:
    """Formats the progress of sampling after ``seconds`` as text."""
    rate = now.tokens / seconds if seconds else 0.0
    return (
        f"{now.done:,} of {now.begun:,} responses, {rate:,.0f} tokens/s, oldest request in flight for "
        f"{now.oldest_seconds:.0f} s"
    )


_TELL_DEVELOPERS = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.distributed.distributed_data_parallel",
)
"""Loggers whose warnings in Megatron-Core 0.19 tell of coming changes to its interface."""


def silence_libraries() -> None:
    """Silences warnings, log lines below WARNING and progress bars of Megatron, torch and transformers."""
    import transformers

    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    for name in ("megatron", "nvidia", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _TELL_DEVELOPERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call] # untyped in transformers
