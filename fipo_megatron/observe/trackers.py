"""Trackers: TensorBoard, and services whose packages are installed."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.config import ObserveConfig
from fipo_megatron.storage.json_files import one_line

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


class Tracker(Protocol):
    """Receives the metrics of a run by the tags of :mod:`.observe.metrics`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Reports the scalars of a step; all are finite."""

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Reports a histogram: int64 counts ``[n]``, at least one not 0, between float64 edges ``[n + 1]``."""

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Reports responses: rows of :mod:`.observe.trajectory_files`."""

    def close(self) -> None:
        """Flushes and closes the tracker."""


class TensorBoard:
    """Writes TensorBoard event files.

    Args:
        directory: Directory of the event files.
        first_step: First step to be reported; events of this step and later in older files are purged.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second

        self._writer = SummaryWriter(str(directory), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of a step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Adds a histogram with its own bins."""
        used = np.flatnonzero(counts)
        middles, chosen = (edges[1:] + edges[:-1])[used] / 2, counts[used]
        # An empty bin before each used bin marks where the used one begins.
        limits = np.stack([edges[used], edges[used + 1]], 1).flatten()
        buckets = np.stack([np.zeros_like(chosen), chosen], 1).flatten()
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[used[0]]),
            max=float(edges[used[-1] + 1]),
            num=int(chosen.sum()),
            sum=float((middles * chosen).sum()),
            sum_squares=float((middles**2 * chosen).sum()),
            bucket_limits=limits.tolist(),
            bucket_counts=buckets.tolist(),
            global_step=step,
        )

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds responses as Markdown code blocks."""
        self._writer.add_text(tag, "\n\n---\n\n".join(map(as_markdown, rows)), step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class Wandb:
    """Reports to Weights & Biases, which is configured by its own environment variables: WANDB_MODE=offline.

    Args:
        project: Name of the project.
        output: Output directory of the run. Name and id of the W&B run follow from it, so a resumed run continues.
        config: Configuration of the run.
    """

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = hashlib.blake2b(str(output.resolve()).encode(), digest_size=8).hexdigest()
        self._wandb = wandb
        # W&B's own steps cannot decrease, but a run may roll back to an earlier step.
        self._run = wandb.init(
            project=project, name=output.name, id=identity, resume="allow", dir=str(output), config=dict(config)
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scalars of a step."""
        self._run.log({"step": step} | dict(values))

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Logs a histogram, merged into at most 512 bins, the limit of W&B."""
        used = np.flatnonzero(counts)
        first, last = int(used[0]), int(used[-1]) + 1
        width = -(-(last - first) // 512)
        starts = np.arange(first, last, width)
        histogram = np.add.reduceat(counts[first:last], starts - first), np.append(edges[starts], edges[last])
        self._run.log({"step": step, f"histograms/{tag}": self._wandb.Histogram(np_histogram=histogram)})

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs responses as a table."""
        columns = ["step", "prompt", "response", "ground_truth", "reward", "accuracy", "advantage"]
        table = self._wandb.Table(columns=[*columns], data=[[row[name] for name in columns] for row in rows])
        self._run.log({"step": step, tag: table})

    def close(self) -> None:
        """Finishes the run and ends the process of W&B."""
        self._run.finish()
        self._wandb.teardown()


class Swanlab:
    """Reports to SwanLab, which is configured by its own environment variables: SWANLAB_MODE=offline.

    Args:
        project: Name of the project.
        output: Output directory of the run; its last part is the name of the experiment.
        config: Configuration of the run.
    """

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(project=project, experiment_name=output.name, logdir=str(output / "swanlab"), config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scalars of a step."""
        self._swanlab.log(dict(values), step=step)

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Does nothing: SwanLab has no histograms."""

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs responses as Markdown texts."""
        self._swanlab.log({tag: [self._swanlab.Text(as_markdown(row)) for row in rows]}, step=step)

    def close(self) -> None:
        """Finishes the experiment."""
        self._swanlab.finish()


_SERVICES: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {"wandb": Wandb, "swanlab": Swanlab}


_CAN_REPORT = {
    "wandb": """
import netrc, os, urllib.parse, wandb
settings = wandb.setup().settings
key = settings.api_key or getattr(settings, "identity_token_file", None)
if settings.mode not in ("offline", "dryrun", "disabled") and not key:
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
        key = "api.wandb.ai" in hosts or urllib.parse.urlsplit(settings.base_url).hostname in hosts
    except (OSError, netrc.NetrcParseError):
        pass
    if not key:
        raise RuntimeError("it has no API key")
""",
    "swanlab": """
import swanlab
settings = swanlab.Settings()
if getattr(settings, "mode", "") in ("online", "cloud") and not getattr(settings, "api_key", "unknown"):
    raise RuntimeError("it has no API key")
""",
}
"""Programs that raise an error if a service has no API key to report with; none of them connects to the service."""
_REMEDY = {
    "wandb": "set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline",
    "swanlab": "set SWANLAB_API_KEY, run `swanlab login`, or set SWANLAB_MODE=offline",
}
_CHECK_SECONDS = 60.0


def tracker_problems(config: ObserveConfig, *, writes: bool) -> list[str]:
    """Lists configured trackers that cannot report, because their package or its API key is missing, a line each.

    Args:
        config: The section ``observe``.
        writes: Whether this rank writes. Only then are keys looked for, each by a process that has no terminal, because
            the packages ask for a missing key.
    """
    asked = [("observe.tensorboard = True", "tensorboard")] if config.tensorboard else []
    asked += [(f"observe.trackers = {list(config.trackers)}", name) for name in config.trackers]
    problems = []
    for field, name in asked:
        if not importlib.util.find_spec(name):
            problems.append(f"{field}: {name} is not installed here")
        elif writes and (problem := _cannot_report(name)):
            problems.append(f"{field}: {name} cannot report: {problem}; {_REMEDY[name]}")
    return problems


def _cannot_report(name: str) -> str:
    """Returns why a service cannot be reported to; an empty string if nothing is known that speaks against it."""
    if name not in _CAN_REPORT:
        return ""
    program = f"try:\n{textwrap.indent(_CAN_REPORT[name], '    ')}\nexcept Exception as error:\n"
    program += "    print('\\n!' + ' '.join(str(error).split()))"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return next((line[1:].rstrip(".") for line in done.stdout.splitlines() if line.startswith("!")), "")


def open_trackers(config: ObserveConfig, output: Path, described: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """Opens all trackers that a run is configured to report to.

    Args:
        config: The section ``observe``.
        output: Output directory of the run.
        described: Complete configuration of the run.
        first_step: First step to be reported.

    Raises:
        ConnectionError: A service does not accept the run.
    """
    found: list[Tracker] = [TensorBoard(output / "tensorboard", first_step)] if config.tensorboard else []
    for name in config.trackers:
        try:
            found.append(_SERVICES[name](config.project, output, described))
        except Exception as error:  # each package has its own kinds
            for tracker in found:
                tracker.close()
            where = f"observe.trackers = {list(config.trackers)}: {name} cannot be opened"
            raise ConnectionError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    return found


def as_markdown(row: Mapping[str, Any]) -> str:
    """Formats a response as Markdown that shows its texts as they are: no text becomes a link, an image or a heading.

    Texts of data and policy stand in indented code blocks, each of their lines indented.
    """
    head = f"reward {row['reward']}, advantage {row['advantage']}, {row['response_tokens']} tokens"
    names = f"{row['prompt_id']}/{row['sample']}\ntruth {row['ground_truth']}"
    return "\n\n".join([head, *map(_code_block, (names, row["prompt"], row["response"]))])


def _code_block(text: str) -> str:
    """Returns a text as an indented code block.

    Markdown ends a line at every line boundary of Unicode or at none, depending on its implementation; all are line
    feeds here. Control characters have no place in a page, and Markdown's implementations use some as marks.
    """
    lines = (_CONTROLS.sub("\ufffd", line) for line in text.replace("\t", "    ").splitlines())
    return "\n".join(f"    {line}" for line in lines)
