"""Where the numbers of a run go beside its own files: TensorBoard, and services whose packages are installed."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.config import ObserveConfig


class Tracker(Protocol):
    """Takes what a run reports. Tags are those of :mod:`.observe.metrics`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step; all finite."""

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Counts ``[n]`` between edges ``[n + 1]``; at least one is not 0."""

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some responses: rows of :mod:`.observe.trajectory_files`."""

    def close(self) -> None:
        """Everything is written after this."""


class TensorBoard:
    """Event files.

    Args:
        directory: Of the files.
        first_step: What was written of this step and later ones is void.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports take a second

        self._writer = SummaryWriter(str(directory), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """See :class:`Tracker`."""
        used = np.flatnonzero(counts)
        middles, chosen = (edges[1:] + edges[:-1])[used] / 2, counts[used]
        # An empty bin before each used one says where that begins.
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
        """See :class:`Tracker`; as Markdown, in which a response is indented and so is only text."""
        self._writer.add_text(tag, "\n\n---\n\n".join(map(as_markdown, rows)), step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases. Its own environment variables say where to, and whether at all: WANDB_MODE=offline.

    Args:
        project: See ``observe.project``.
        output: Of the run; its name and its identity, so that a resumed run goes on.
        config: Of the run.
    """

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = hashlib.blake2b(str(output.resolve()).encode(), digest_size=8).hexdigest()
        self._wandb = wandb
        # A run that has returned to an earlier step goes back, too, which W&B's own steps cannot.
        self._run = wandb.init(
            project=project, name=output.name, id=identity, resume="allow", dir=str(output), config=dict(config)
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log({"step": step} | dict(values))

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """See :class:`Tracker`; in at most 512 bins, which is what there may be."""
        used = np.flatnonzero(counts)
        first, last = int(used[0]), int(used[-1]) + 1
        width = -(-(last - first) // 512)
        starts = np.arange(first, last, width)
        histogram = np.add.reduceat(counts[first:last], starts - first), np.append(edges[starts], edges[last])
        self._run.log({"step": step, f"histograms/{tag}": self._wandb.Histogram(np_histogram=histogram)})

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See :class:`Tracker`."""
        columns = ["step", "prompt", "response", "ground_truth", "reward", "accuracy", "advantage"]
        table = self._wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
        self._run.log({"step": step, tag: table})

    def close(self) -> None:
        """See :class:`Tracker`; its own process ends, too."""
        self._run.finish()
        self._wandb.teardown()


class Swanlab:
    """SwanLab. Its own environment variables say where to: SWANLAB_MODE=offline. It has no histograms.

    Args:
        project: See ``observe.project``.
        output: Of the run; its name.
        config: Of the run.
    """

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(project=project, experiment_name=output.name, logdir=str(output / "swanlab"), config=dict(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._swanlab.log(dict(values), step=step)

    def histogram(self, step: int, tag: str, edges: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Nothing: there is no such chart."""

    def text(self, step: int, tag: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """See :class:`Tracker`."""
        self._swanlab.log({tag: [self._swanlab.Text(as_markdown(row)) for row in rows]}, step=step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._swanlab.finish()


_SERVICES = {"wandb": Wandb, "swanlab": Swanlab}


def missing_packages(config: ObserveConfig) -> list[str]:
    """What is asked for and not installed, a line each."""
    asked = [("observe.tensorboard = True", "tensorboard")] if config.tensorboard else []
    asked += [(f"observe.trackers = {list(config.trackers)}", name) for name in config.trackers]
    return [f"{field}: {name} is not installed here" for field, name in asked if not importlib.util.find_spec(name)]


def open_trackers(config: ObserveConfig, output: Path, described: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """All that a run is configured to report to.

    Args:
        config: See :class:`.config.ObserveConfig`.
        output: Of the run.
        described: Its whole configuration.
        first_step: That will be reported.
    """
    found: list[Tracker] = [TensorBoard(output / "tensorboard", first_step)] if config.tensorboard else []
    return found + [_SERVICES[name](config.project, output, described) for name in config.trackers]


def as_markdown(row: Mapping[str, Any]) -> str:
    """A response with what was asked, as code blocks by indentation, which nothing in them can end."""
    head = f"**{row['prompt_id']}/{row['sample']}** reward {row['reward']}, advantage {row['advantage']}, "
    head += f"{row['response_tokens']} tokens, truth {row['ground_truth']!r}"
    blocks = ("    " + row[name].replace("\n", "\n    ") for name in ("prompt", "response"))
    return "\n\n".join([head, *blocks])
