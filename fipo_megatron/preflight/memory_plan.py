"""The planned memory of the GPUs of a job: that of ``fipo plan``, computed once, on node 0."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fipo_megatron.config import Config, layout_conflicts
from fipo_megatron.plan.gpu_memory import GIB, has_engine, responses_per_server, trainer_memory
from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from fipo_megatron.plan.trace import Layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageMemory:
    """The memory of a GPU of a pipeline stage.

    Attributes:
        name: Name of the kind of rank in the plan, with the phase that needs the most.
        needed: Bytes without the plan's allowance: more than a GPU has, and the run cannot start.
        planned: Bytes with the allowance.
    """

    name: str
    needed: int
    planned: int


@dataclass(frozen=True)
class PlannedMemory:
    """The memory that a run needs on its GPUs.

    Attributes:
        config: Configuration of the run.
        architecture: Architecture of the model.
        ranks_per_node: Ranks of the trainer on each of its nodes.
        stages: Memory of each pipeline stage.
        ranks: Number of ranks.
    """

    config: Config
    architecture: Architecture
    ranks_per_node: int
    stages: tuple[StageMemory, ...]
    ranks: int

    def of_node(self, rank: int) -> StageMemory:
        """Returns the largest memory of a GPU on one of the trainer's nodes, whose rank is given.

        Megatron numbers the ranks stage by stage.
        """
        first = rank * self.ranks_per_node
        each = self.ranks // len(self.stages)
        present = {number // each for number in range(first, min(first + self.ranks_per_node, self.ranks))}
        return max((self.stages[stage] for stage in present), key=lambda stage: stage.planned)

    def responses(self, gpu_bytes: int) -> int | None:
        """Returns how many responses of full length fit a server at a time; None if the run starts no servers."""
        if not starts_servers(self.config):
            return None
        return responses_per_server(self.config, self.architecture, gpu_bytes / GIB)


def starts_servers(config: Config) -> bool:
    """Returns whether the job itself has servers."""
    return has_engine(config) and config.rollout.engine == "sglang" and not config.rollout.servers.urls


def server_gpus(config: Config) -> int:
    """Returns the GPUs of each of the trainer's nodes that belong to servers alone."""
    servers = config.rollout.servers
    if not starts_servers(config) or servers.colocated:
        return 0
    return servers.per_host * int(config.rollout.sglang.get("tp_size", 1))


def start_plan(
    config: Config, nodes: int, gpus_per_node: int | None, servers: int
) -> Future[PlannedMemory | None] | None:
    """Begins to plan the memory in a thread, while the nodes are examined; returns None without a GPU on node 0.

    Args:
        config: Configuration of the run.
        nodes: Number of the trainer's nodes.
        gpus_per_node: GPUs of each node; None: as many as node 0 has.
        servers: GPUs of each node that belong to servers alone.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found or config.run.preflight == "off":
        return None
    future: Future[PlannedMemory | None] = Future()
    ranks = (gpus_per_node or found) - servers
    threading.Thread(
        target=lambda: future.set_result(plan_memory(config, nodes, ranks)), name="plan", daemon=True
    ).start()
    return future


def finished_plan(plan: Future[PlannedMemory | None] | None, seconds: float) -> PlannedMemory | None:
    """Returns the plan that was begun; None if there is none, or if it takes too long, which is logged."""
    try:
        return plan.result(seconds) if plan else None
    except TimeoutError:
        logger.warning("the memory of the actor was not planned: it took more than %g s (--timeout)", seconds)
        return None


def plan_memory(config: Config, nodes: int, ranks_per_node: int) -> PlannedMemory | None:
    """Traces every kind of rank, as ``fipo plan`` does; takes some 20 seconds, in processes of their own.

    Args:
        config: Configuration of the run.
        nodes: Number of the trainer's nodes.
        ranks_per_node: Ranks on each of them.

    Returns:
        The memory; None if the layout does not fit the ranks, or the actor cannot be traced, which is logged.
    """
    from fipo_megatron.actor.megatron_config import transformer_engine_used

    ranks, parallel = nodes * ranks_per_node, config.actor.parallel
    if ranks < 1 or layout_conflicts(parallel, ranks):
        return None
    layers: Layers = "transformer_engine" if transformer_engine_used(config.actor) else "torch"
    replicas = ranks // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)
    stages: dict[int, StageMemory] = {}
    try:
        architecture = Architecture.from_directory(config.model.path)
        kinds = rank_kinds(architecture, parallel, ranks)
        with Tracer() as tracer:
            traces = [tracer.rank(config, architecture, kind, ranks, layers) for kind in kinds]
            for kind, trace in zip(kinds, traces, strict=True):
                phase = trainer_memory(kind.name, trace.result(), config, architecture, replicas).largest
                found = StageMemory(f"{kind.name}: {phase.name}", phase.total - phase.parts["allowance"], phase.total)
                stages |= dict.fromkeys(kind.stages, found)
    except Exception as error:  # a fault of the trace must not keep a run from starting
        logger.warning("the memory of the actor was not planned: %s: %s", type(error).__name__, error)
        return None
    return PlannedMemory(config, architecture, ranks_per_node, tuple(stages[stage] for stage in sorted(stages)), ranks)
