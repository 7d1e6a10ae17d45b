"""What people see while a run is going on: log lines, a line per step, and how far sampling is.

On a terminal with colours and a live bar, else plain lines. The first rank alone says all of it; the others say what is
wrong, with their rank.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn

from fipo_megatron.rollout.sampling_progress import ProgressSnapshot

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 30.0
"""Between two lines about sampling where there is no terminal."""
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
"""Of the line per step: title, tag, format and width."""


def set_up_logging(rank: int, *, plain: bool) -> Console | None:
    """Log lines of this process on stderr; rank 0's from INFO on, the others' from WARNING on, each with its rank.

    Returns:
        The terminal of rank 0; None where there is none, or plain lines are wanted.
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
    """An aligned line per step, with a header now and then."""

    def __init__(self) -> None:
        self._written = 0

    def say(self, step: int, of: int, values: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """A step.

        Args:
            step: Its number.
            of: Steps of the run.
            values: Metrics by tag.
            seconds: By part; what is below a tenth is left out.
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
        parts = "  ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05)
        logger.info("%s/%d  %s  %s", str(step).rjust(width), of, "  ".join(cells), parts)


@contextmanager
def show_sampling_progress(
    console: Console | None, ask: Callable[[], ProgressSnapshot | None] | None
) -> Iterator[None]:
    """A block in which responses are sampled, and the first rank shows how far that is.

    Args:
        console: A terminal; None: a log line every half minute.
        ask: How far sampling is; None: nothing is shown.
    """
    if ask is None:
        yield
        return
    ended = threading.Event()
    show = _line_now_and_then if console is None else _bar(console)
    thread = threading.Thread(target=show, args=(ended, ask), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _line_now_and_then(ended: threading.Event, ask: Callable[[], ProgressSnapshot | None]) -> None:
    start = time.monotonic()
    while not ended.wait(_QUIET_SECONDS):
        if (now := ask()) is not None:
            logger.info("sampling: %s", describe(now, time.monotonic() - start))


def _bar(console: Console) -> Callable[[threading.Event, Callable[[], ProgressSnapshot | None]], None]:
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
    """In words."""
    rate = now.tokens / seconds if seconds else 0.0
    return (
        f"{now.done:,} of {now.begun:,} responses, {rate:,.0f} tokens/s, the longest in flight for "
        f"{now.oldest_seconds:.0f} s"
    )


def silence_libraries() -> None:
    """Silences warnings, log lines below WARNING and progress bars of Megatron, torch and transformers."""
    import transformers

    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    for name in ("megatron", "nvidia", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call] # untyped in transformers
