"""Estimates the time of a step of a run, by phase, from FLOPs, bytes and efficiencies.

:func:`estimate_step` is pure arithmetic: it needs neither torch.distributed nor Megatron, and a search may call it
thousands of times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fipo_megatron.config import Config
from fipo_megatron.observe.devices import Device
from fipo_megatron.plan.efficiencies import TABLE, Efficiency, Kind
from fipo_megatron.plan.response_lengths import ResponseLengths
from fipo_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class ClusterShape:
    """The GPUs of a run.

    Attributes:
        trainer_gpus: GPUs of the trainer's ranks.
        rollout_gpus: GPUs of the servers; the trainer's own with ``rollout.servers.colocated``.
        gpus_per_node: GPUs per node.
    """

    trainer_gpus: int
    rollout_gpus: int
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Workload:
    """What a step has to do that the configuration does not say.

    Attributes:
        lengths: Lengths of responses and prompts.
        kept_fraction: Fraction of groups that dynamic sampling keeps; 1 without it.
    """

    lengths: ResponseLengths
    kept_fraction: float = 1.0

    @classmethod
    def default(cls, config: Config) -> Workload:
        raise NotImplementedError


@dataclass(frozen=True)
class Piece:
    """A part of a phase.

    Attributes:
        name: Name.
        seconds: Seconds per step.
        basis: Weakest kind of efficiency that the number rests on.
        note: Figures behind the number, for people.
    """

    name: str
    seconds: float
    basis: Kind
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """A phase of a step: generate, offload, log_probs, update, sync.

    Attributes:
        name: Name, as in ``time/*`` of a run.
        pieces: Parts; their seconds add up.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return sum(piece.seconds for piece in self.pieces)


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a step.

    Attributes:
        phases: Phases in their order.
        step_seconds: Seconds from one step to the next; less than the sum of the phases with ``rollout.overlap``.
        gpus: GPUs of trainer and servers together.
        steps: ``run.steps``.
        figures: Further figures by name: tokens per step, MFU, concurrency and the like.
    """

    phases: tuple[Phase, ...]
    step_seconds: float
    gpus: int
    steps: int
    figures: Mapping[str, float]

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.step_seconds * self.steps * self.gpus / 3600

    def rows(self) -> list[dict[str, str]]:
        """Returns the rows of the table: phase, part, seconds, share of the step, basis, note."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for ``plan.json``."""
        raise NotImplementedError


def estimate_step(
    config: Config,
    architecture: Architecture,
    shape: ClusterShape,
    device: Device,
    kv_concurrency: int | None = None,
    *,
    workload: Workload | None = None,
    table: Mapping[str, Efficiency] = TABLE,
) -> StepTime:
    """Estimates the time of a step.

    Args:
        config: Configuration of the run.
        architecture: Architecture of the model.
        shape: GPUs of trainer and servers.
        device: The GPUs.
        kv_concurrency: Responses of full length whose KV cache fits one server; None: computed from the memory.
        workload: Lengths, and groups that are kept; None: defaults (:meth:`Workload.default`).
        table: Efficiencies.

    Raises:
        ValueError: The layout does not fit the GPUs, or the model does not fit a server.
    """
    raise NotImplementedError
