"""Worker processes that trace ranks (:mod:`.trace`): each is spoiled for training, and several run at the same time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from fipo_megatron.config import Config
from fipo_megatron.plan.rank_kinds import RankKind
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from fipo_megatron.plan.rank_memory import RankMemory
    from fipo_megatron.plan.trace import Layers

_ENVIRONMENT: Mapping[str, str] = {
    # The functions that a GPU compiles are counted as one operator each (stand_ins.install).
    "TORCHDYNAMO_DISABLE": "1",
    # Also where there is a GPU: nothing is allocated on it.
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

_ABSENT = ("transformer_engine", "apex", "amp_C", "flash_attn", "flash_attn_3")
"""Packages that Megatron-Core would use and that compute on a GPU only. A trace is the same with and without them."""


@dataclass(frozen=True)
class LayerCost:
    """Memory of the passes of one pipeline stage without data parallelism, from models of one and of two layers.

    Attributes:
        per_layer: Bytes that a micro-batch keeps per layer from forward to backward.
        besides: Bytes that it keeps besides: embedding, final norm, log-probs.
        temporary: Bytes that are live for a short time only, at most.
        tokens: Tokens of the micro-batch, all ranks together; the rest is proportional to them.
    """

    per_layer: int
    besides: int
    temporary: int
    tokens: int


class Tracer:
    """Traces ranks in worker processes, as long as its block runs.

    Args:
        workers: Number of processes; None: one per core, at most four.
    """

    def __init__(self, workers: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(
            workers or min(4, cores), multiprocessing.get_context("spawn"), initializer=_start
        )

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)

    def rank(
        self, config: Config, architecture: Architecture, kind: RankKind, world_size: int, layers: Layers
    ) -> Future[RankMemory]:
        """Begins to trace a kind of ranks (:func:`.trace.trace_rank`)."""
        return self._pool.submit(_trace, config, architecture, kind.rank, world_size, kind.micro_batches, layers)

    def layer(self, config: Config, architecture: Architecture, layers: Layers) -> Future[LayerCost]:
        """Begins to trace one layer under the tensor, context and expert parallelism of a configuration."""
        return self._pool.submit(_trace_layer, config, architecture, layers)


def _start() -> None:
    os.environ.update(_ENVIRONMENT)
    for name in _ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    warnings.simplefilter("ignore")  # Megatron-Core warns when it is imported


def _trace(
    config: Config, architecture: Architecture, rank: int, world_size: int, micro_batches: int, layers: Layers
) -> RankMemory:
    from fipo_megatron.plan.trace import trace_rank

    return trace_rank(config, architecture, rank, world_size, micro_batches, layers)


def _trace_layer(config: Config, architecture: Architecture, layers: Layers) -> LayerCost:
    parallel = replace(config.actor.parallel, pipeline_parallel=1, virtual_pipeline=1)
    config = replace(config, actor=replace(config.actor, parallel=parallel, fp8_bf16_first_last=0))
    dense = parallel.tensor_parallel * parallel.context_parallel
    experts = parallel.expert_parallel * parallel.expert_tensor_size
    world_size = dense * experts if dense % experts else dense
    one, two = (_trace(config, _of_layers(architecture, count), 0, world_size, 1, layers).update for count in (1, 2))
    per_layer = two.held - one.held
    return LayerCost(per_layer, one.held - per_layer, two.peak - two.held, config.actor.token_budget)


def _of_layers(architecture: Architecture, count: int) -> Architecture:
    mixture = architecture.mixture
    if mixture is not None:
        mixture = replace(mixture, layers=(any(mixture.layers),) * count)
    return replace(architecture, layers=count, mixture=mixture)
