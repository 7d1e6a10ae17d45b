"""The kinds of ranks that differ in memory: pipeline stages with other layers, or more micro-batches in flight."""

from __future__ import annotations

from dataclasses import dataclass

from fipo_megatron.config import ParallelConfig
from fipo_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class RankKind:
    """Pipeline stages of which one stands for all.

    Attributes:
        stages: The stages.
        stage: The stage that is traced: the earliest, which has the most micro-batches in flight.
        rank: Its first rank. Megatron numbers the ranks stage by stage (``parallel_state.py``, ``tp-cp-ep-dp-pp``).
        micro_batches: Micro-batches that fill the pipeline.
    """

    stages: tuple[int, ...]
    stage: int
    rank: int
    micro_batches: int

    @property
    def name(self) -> str:
        """Name in the table."""
        first, last = self.stages[0], self.stages[-1]
        return f"stage {first}" if first == last else f"stages {first} to {last}"


def rank_kinds(architecture: Architecture, parallel: ParallelConfig, world_size: int) -> list[RankKind]:
    """Returns the kinds of ranks of a layout, by stage.

    Tensor-, context- and data-parallel ranks of a stage hold equal parts. Stages between the first and the last differ
    in their micro-batches in flight, which get fewer from stage to stage.
    """
    stages, virtual = parallel.pipeline_parallel, parallel.virtual_pipeline
    micro_batches = 1 if stages == 1 else stages if virtual == 1 else 2 * stages
    groups: dict[tuple[object, ...], list[int]] = {}
    for stage in range(stages):
        end = stage if stage in (0, stages - 1) else "between"
        groups.setdefault((end, _layers(architecture, stage, stages, virtual)), []).append(stage)
    return [
        RankKind(tuple(members), members[0], members[0] * world_size // stages, micro_batches)
        for members in groups.values()
    ]


def _layers(architecture: Architecture, stage: int, stages: int, virtual: int) -> tuple[bool, ...]:
    """Returns for each layer of a stage whether it is a mixture, if the layers are divided evenly."""
    sparse = architecture.mixture.layers if architecture.mixture else (False,) * architecture.layers
    size = architecture.layers // (stages * virtual)
    starts = [(chunk * stages + stage) * size for chunk in range(virtual)]
    return tuple(sparse[layer] for start in starts for layer in range(start, start + size))
