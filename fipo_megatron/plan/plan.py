"""The plan of a run: memory by kind of GPU, whether it fits, time of a step, disk space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fipo_megatron.checkpoint.disk_space import DiskSpace
from fipo_megatron.config import Config
from fipo_megatron.observe.devices import Device
from fipo_megatron.plan.gpu_memory import (
    GIB,
    GpuMemory,
    has_engine,
    responses_per_server,
    server_memory,
    trainer_memory,
)
from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.plan.step_estimate import ClusterShape, StepTime, Workload, estimate_step
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from fipo_megatron.plan.trace import Layers

Report = Callable[[str], None]
"""Callback that shows a line of progress."""


@dataclass(frozen=True)
class Request:
    """A run, and the GPUs to plan it for.

    Attributes:
        config: Configuration of the run.
        architecture: Architecture of the model.
        shape: GPUs of trainer and servers.
        device: Kind of the GPUs.
        gpu_bytes: Memory of a GPU.
        layers: Kind of the layers.
        workload: Lengths of the responses and groups that are kept; None: defaults.
    """

    config: Config
    architecture: Architecture
    shape: ClusterShape
    device: Device
    gpu_bytes: int
    layers: Layers
    workload: Workload | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        request: The run and its GPUs.
        gpus: Memory of each kind of GPU: those of the trainer, then that of the servers.
        responses_per_server: Responses of full length whose KV cache fits a server; None without servers.
        time: Time of a step; None if no response fits a server.
        disk: Disk space.
    """

    request: Request
    gpus: tuple[GpuMemory, ...]
    responses_per_server: int | None
    time: StepTime | None
    disk: DiskSpace

    @property
    def problems(self) -> list[str]:
        """Reasons why the run does not fit the GPUs; none if it fits."""
        room = self.request.gpu_bytes
        found = [
            f"{gpu.name}: {gpu.largest.name} needs {gpu.largest.total / GIB:.1f} GiB of {room / GIB:.1f} GiB"
            for gpu in self.gpus
            if gpu.largest.total > room and gpu.name != "server"
        ]
        if self.responses_per_server == 0:
            tensor = int(self.request.config.rollout.sglang.get("tp_size", 1))
            found.append(
                f"server: rollout.sglang.tp_size = {tensor}: beside the weights there is no room for the KV cache of "
                "one response of full length"
            )
        return found

    @property
    def peak_bytes(self) -> int:
        """Largest memory of a GPU of the trainer."""
        return max(gpu.largest.total for gpu in self.gpus if gpu.name != "server")

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for ``plan.json``."""
        request = self.request
        return {
            "fits": not self.problems,
            "problems": self.problems,
            "device": asdict(request.device) | {"planned_bytes": request.gpu_bytes},
            "cluster": asdict(request.shape),
            "layers": request.layers,
            "weights": {
                "tensors": len(tables.hf_tensors(request.architecture)),
                "parameters": tables.parameter_count(request.architecture),
            },
            "gpus": {gpu.name: {phase.name: dict(phase.parts) for phase in gpu.phases} for gpu in self.gpus},
            "responses_per_server": self.responses_per_server,
            "time": self.time.as_dict() if self.time else None,
            "disk": asdict(self.disk) | {"total": self.disk.total},
        }


def make_plan(request: Request, tracer: Tracer, report: Report = lambda line: None) -> Plan:
    """Traces every kind of rank and estimates the rest.

    Raises:
        ValueError: The run is not valid: what ``fipo train`` would refuse, too.
    """
    config, architecture, shape = request.config, request.architecture, request.shape
    kinds = rank_kinds(architecture, config.actor.parallel, shape.trainer_gpus)
    traces = [tracer.rank(config, architecture, kind, shape.trainer_gpus, request.layers) for kind in kinds]
    gpus = []
    for kind, trace in zip(kinds, traces, strict=True):
        gpus.append(trainer_memory(kind.name, trace.result(), config, architecture, data_parallel_size(request)))
        report(f"traced {kind.name} of {config.actor.parallel.pipeline_parallel}")
    responses = None
    if has_engine(config) and config.rollout.engine == "sglang":
        gpus.append(server_memory(config, architecture, request.gpu_bytes))
        responses = responses_per_server(config, architecture, request.gpu_bytes / GIB)
    return Plan(request, tuple(gpus), responses, step_time(request, responses), DiskSpace.of_run(config, architecture))


def step_time(request: Request, responses: int | None) -> StepTime | None:
    """Returns the time of a step; None if no response fits a server."""
    if responses == 0:
        return None
    return estimate_step(
        request.config, request.architecture, request.shape, request.device, responses, workload=request.workload
    )


def data_parallel_size(request: Request) -> int:
    """Returns the number of the trainer's model replicas."""
    parallel = request.config.actor.parallel
    return request.shape.trainer_gpus // (
        parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    )
