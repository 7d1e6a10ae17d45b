"""Other layouts for the same GPUs: which would fit, and which would be fastest.

The memory of a candidate is put together from the cost of one layer (:class:`.tracing.LayerCost`), traced once for each
combination of tensor, context and expert parallelism and recompute, so that hundreds of layouts take a minute. The ones
that are proposed are then planned in full.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from fipo_megatron.checkpoint.disk_space import OPTIMIZER_BYTES
from fipo_megatron.config import ActorConfig, ParallelConfig, layout_conflicts
from fipo_megatron.config.padding import micro_batch_multiple
from fipo_megatron.plan.gpu_memory import GIB, has_engine, responses_per_server, trainer_memory
from fipo_megatron.plan.plan import Plan, Report, Request, data_parallel_size, make_plan, step_time
from fipo_megatron.plan.rank_memory import PassMemory, RankMemory
from fipo_megatron.plan.tracing import LayerCost, Tracer
from fipo_megatron.plan.training_time import local_parameters
from fipo_megatron.rollout.engine_factory import longest_request

_SIZES = (1, 2, 4, 8, 16)
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_GRADIENT_BYTES = 4
_PER_CHANGE = 1.03
_TIGHT = 0.95
"""Fraction of the memory that a candidate may take by the short computation; the full plan decides."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits by the short computation.

    Attributes:
        request: Request with the layout.
        changes: Settings that differ from the given configuration, as overrides.
        peak_bytes: Memory of a GPU of the trainer.
        seconds: Seconds of a step.
        training_seconds: Seconds of log-probs and update; with ``rollout.overlap`` sampling may hide them.
    """

    request: Request
    changes: tuple[str, ...]
    peak_bytes: int
    seconds: float
    training_seconds: float


def fitting_layouts(request: Request, tracer: Tracer, report: Report = lambda line: None) -> list[Candidate]:
    """Returns the layouts that fit, the fastest first; among equals the one that trains faster.

    Tensor parallelism stays within a node. Interleaved pipelines are not tried.

    Args:
        request: Request with the given layout; GPUs, model and batch stay the same.
        tracer: Worker processes.
        report: Callback for progress.
    """
    variants = list(_variants(request))
    costs: dict[tuple[Any, ...], Future[LayerCost]] = {}
    for actor in variants:
        if (key := _cost_key(actor)) not in costs:
            config = replace(request.config, actor=actor)
            costs[key] = tracer.layer(config, request.architecture, request.layers)
    report(f"{len(variants)} layouts from {len(costs)} traced layers")
    responses = None
    if has_engine(request.config) and request.config.rollout.engine == "sglang":
        responses = responses_per_server(request.config, request.architecture, request.gpu_bytes / GIB)
    found = []
    for actor in variants:
        changed = replace(request, config=replace(request.config, actor=actor))
        peak = _peak_bytes(changed, costs[_cost_key(actor)].result())
        if peak > _TIGHT * request.gpu_bytes:
            continue
        if (time := step_time(changed, responses)) is not None:
            training = time.phase("log_probs") + time.phase("update")
            found.append(Candidate(changed, _changes(request.config.actor, actor), peak, time.step_seconds, training))
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.training_seconds))


def with_fitting_servers(request: Request) -> tuple[Request, tuple[str, ...]]:
    """Returns the request with servers that hold a response of full length, and the override that it takes.

    The fastest tensor-parallel size is chosen, if that of the request is too small.
    """
    config = request.config
    if not has_engine(config) or config.rollout.engine != "sglang":
        return request, ()
    found: list[tuple[float, int, Request]] = []
    given = int(config.rollout.sglang.get("tp_size", 1))
    for size in (given, *_SIZES):
        rollout = replace(config.rollout, sglang=config.rollout.sglang | {"tp_size": size})
        changed = replace(request, config=replace(config, rollout=rollout))
        responses = responses_per_server(changed.config, request.architecture, request.gpu_bytes / GIB)
        if not responses or request.shape.rollout_gpus % size:
            continue
        if size == given:
            return request, ()
        if (time := step_time(changed, responses)) is not None:
            found.append((time.step_seconds, size, changed))
    if not found:
        return request, ()
    _, size, changed = min(found, key=lambda entry: entry[:2])
    return changed, (f"rollout.sglang.tp_size={size}",)


def nearest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns fast candidates with few changes first: each change counts like some more time per step."""
    return sorted(candidates, key=lambda candidate: candidate.seconds * _PER_CHANGE ** len(candidate.changes))


def confirmed(
    candidates: Sequence[Candidate], count: int, tracer: Tracer, report: Report = lambda line: None
) -> list[tuple[Candidate, Plan]]:
    """Plans candidates in full, in their order, until ``count`` of them fit."""
    found: list[tuple[Candidate, Plan]] = []
    for candidate in candidates[: 2 * count]:
        plan = make_plan(candidate.request, tracer)
        report(f"planned {' '.join(candidate.changes) or 'the given layout'}")
        if not plan.problems:
            found.append((candidate, plan))
        if len(found) == count:
            break
    return found


def _variants(request: Request) -> Iterator[ActorConfig]:
    """Yields the settings of the actor in every layout that divides model and GPUs."""
    actor, mixture = request.config.actor, request.architecture.mixture
    for tensor in (size for size in _SIZES if size <= request.shape.gpus_per_node):
        for pipeline in _SIZES:
            for context in _SIZES:
                for expert in _SIZES if mixture else (1,):
                    parallel = ParallelConfig(
                        tensor_parallel=tensor,
                        pipeline_parallel=pipeline,
                        context_parallel=context,
                        expert_parallel=expert,
                        sequence_parallel=tensor > 1,
                    )
                    if layout_conflicts(parallel, request.shape.trainer_gpus):
                        continue
                    for recompute, budget in itertools.product(_RECOMPUTE, _budgets(request, parallel)):
                        changed = replace(actor, parallel=parallel, recompute=recompute, token_budget=budget)
                        if not request.architecture.problems(changed) and _is_valid(request, changed):
                            yield changed


def _budgets(request: Request, parallel: ParallelConfig) -> list[int]:
    """Returns the given token budget, and the smallest if that is at least a tenth less."""
    given = request.config.actor.token_budget
    multiple = micro_batch_multiple(replace(request.config.actor, parallel=parallel))
    smallest = -(-longest_request(request.config) // multiple) * multiple
    return [given, smallest] if smallest <= 0.9 * given else [given]


def _is_valid(request: Request, actor: ActorConfig) -> bool:
    """Returns whether the rest of the configuration allows these settings, such as the token budget."""
    try:
        replace(request.config, actor=actor)
    except ValidationError:
        return False
    return True


def _cost_key(actor: ActorConfig) -> tuple[Any, ...]:
    parallel = actor.parallel
    return (parallel.tensor_parallel, parallel.context_parallel, parallel.expert_parallel, actor.recompute)


def _peak_bytes(request: Request, cost: LayerCost) -> int:
    """Returns the memory of the first pipeline stage, as if it had the output layer, too."""
    config, architecture = request.config, request.architecture
    actor, data = config.actor, data_parallel_size(request)
    part = actor.token_budget / cost.tokens
    dense, experts = local_parameters(architecture, actor)
    parallel = actor.parallel
    replicas = data * parallel.context_parallel
    expert_replicas = max(
        1, replicas * parallel.tensor_parallel // (parallel.expert_parallel * parallel.expert_tensor_size)
    )
    sharded = actor.distributed_optimizer
    item = 2 if actor.dtype == "bfloat16" else 4
    layers = architecture.layers // parallel.pipeline_parallel
    held = int(part * parallel.pipeline_parallel * (layers * cost.per_layer + cost.besides))
    traced = RankMemory(
        parameters=int(item * (dense + experts)),
        gradients=int(_GRADIENT_BYTES * (dense + experts)),
        optimizer=int(
            OPTIMIZER_BYTES * (dense / (replicas if sharded else 1) + experts / (expert_replicas if sharded else 1))
        ),
        weight_copies=int(2 * (dense + experts)) if actor.fp8 != "off" else 0,
        log_probs=PassMemory(0, cost.temporary),
        update=PassMemory(held, held + cost.temporary),
        optimizer_step=PassMemory(0, 0),
    )
    return trainer_memory("", traced, config, architecture, data).largest.total


def _changes(before: ActorConfig, after: ActorConfig) -> tuple[str, ...]:
    """Returns the overrides that turn one layout into the other."""
    found = [
        f"actor.parallel.{name}={str(value).lower()}"
        for name in ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "sequence_parallel")
        if (value := getattr(after.parallel, name)) != getattr(before.parallel, name)
    ]
    if before.parallel.virtual_pipeline != 1:
        found.append("actor.parallel.virtual_pipeline=1")
    if after.token_budget != before.token_budget:
        found.append(f"actor.token_budget={after.token_budget}")
    if after.recompute != before.recompute:
        found.append(f"actor.recompute={after.recompute}")
    return tuple(found)
