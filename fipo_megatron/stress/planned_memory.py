"""The planned memory of the actor's ranks at each length, as ``fipo plan`` traces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.plan.rank_memory import RankMemory
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.stress.stress_settings import StressSettings

if TYPE_CHECKING:
    from fipo_megatron.plan.trace import Layers


def planned_memory(
    settings: StressSettings, world_size: int, report: Callable[[str], None] = lambda line: None
) -> dict[int, dict[int, RankMemory]]:
    """Returns the planned memory of a rank by length and pipeline stage; traces in worker processes.

    A fault of the trace is reported and leaves its length out: it must not keep the actor from being measured.

    Args:
        settings: Settings of the stress run.
        world_size: Number of the actor's ranks.
        report: Callback that shows a line of progress.
    """
    parallel = settings.longest.actor.parallel
    kinds = rank_kinds(settings.architecture, parallel, world_size)
    layers = layers_here(settings)
    found: dict[int, dict[int, RankMemory]] = {}
    with Tracer() as tracer:
        begun = {
            length: [tracer.rank(config, settings.architecture, kind, world_size, layers) for kind in kinds]
            for length, config in settings.configs.items()
        }
        for length, traces in begun.items():
            try:
                of_kind = {kind: trace.result() for kind, trace in zip(kinds, traces, strict=True)}
            except Exception as error:
                report(f"plan: {length:,} tokens cannot be traced: {type(error).__name__}: {error}")
                continue
            found[length] = {stage: memory for kind, memory in of_kind.items() for stage in kind.stages}
            report(f"plan: traced {length:,} tokens")
    return found


def layers_here(settings: StressSettings) -> Layers:
    """Returns the kind of the layers with which the actor is built in this process."""
    from fipo_megatron.actor.megatron_config import transformer_engine_used

    if not torch.cuda.is_available():
        return "cpu"
    return "transformer_engine" if transformer_engine_used(settings.longest.actor) else "torch"
