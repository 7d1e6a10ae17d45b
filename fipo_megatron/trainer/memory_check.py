"""Checks before process groups exist that the actor fits the GPU: it is traced on fake tensors, as by ``fipo plan``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import Config
from fipo_megatron.plan.gpu_memory import GIB, trainer_memory
from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from fipo_megatron.plan.trace import Layers

logger = logging.getLogger(__name__)


def check_memory(config: Config, architecture: Architecture, launch: Launch) -> None:
    """Raises ValueError if the actor does not fit the GPU of this rank.

    Only the first rank of each kind of pipeline stage traces; it takes some 20 seconds, in a process of its own. Does
    nothing without CUDA, and with ``run.preflight = off``.

    Raises:
        ValueError: The actor does not fit; the message has the numbers.
    """
    import torch

    if config.run.preflight == "off" or not torch.cuda.is_available():
        return
    from fipo_megatron.actor.megatron_config import transformer_engine_used

    device = launch.local_rank if torch.cuda.device_count() > 1 else 0
    memory = torch.cuda.get_device_properties(device).total_memory
    fused = transformer_engine_used(config.actor)
    if problem := memory_problem(config, architecture, launch, memory, transformer_engine=fused):
        raise ValueError(problem)


def memory_problem(
    config: Config, architecture: Architecture, launch: Launch, gpu_bytes: int, *, transformer_engine: bool
) -> str | None:
    """Returns why the actor does not fit a GPU; None if it does, or if another rank traces its kind.

    A warning is logged if the actor fits only without the plan's allowance, or if it cannot be traced.

    Args:
        config: Configuration of the run.
        architecture: Architecture of the model.
        launch: Position of this process in the job.
        gpu_bytes: Memory of the GPU.
        transformer_engine: Whether the layers are those of Transformer Engine.
    """
    parallel = config.actor.parallel
    kinds = {kind.rank: kind for kind in rank_kinds(architecture, parallel, launch.world_size)}
    if (kind := kinds.get(launch.rank)) is None:
        return None
    layers: Layers = "transformer_engine" if transformer_engine else "torch"
    try:
        with Tracer(workers=1) as tracer:
            traced = tracer.rank(config, architecture, kind, launch.world_size, layers).result()
    except (
        Exception
    ) as error:  # the options were checked before: a fault of the trace must not keep a run from starting
        logger.warning("the memory of the actor was not checked: %s: %s", type(error).__name__, error)
        return None
    replicas = launch.world_size // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)
    phase = trainer_memory(kind.name, traced, config, architecture, replicas).largest
    certain = phase.total - phase.parts["allowance"]
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in phase.parts.items())
    if certain > gpu_bytes:
        return (
            f"actor: {kind.name}: {phase.name} needs {certain / GIB:.1f} GiB, the GPU has {gpu_bytes / GIB:.1f} GiB "
            f"({parts}); fipo plan names layouts that fit, run.preflight = off skips this check"
        )
    if phase.total > gpu_bytes:
        logger.warning(
            "%s: %s takes nearly all of the %.1f GiB of the GPU: %s GiB", kind.name, phase.name, gpu_bytes / GIB, parts
        )
    return None
