"""Memory of a GPU over the phases of a step: what was traced, what the engine takes, and an allowance for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fipo_megatron.config import Config
from fipo_megatron.plan.efficiencies import TABLE
from fipo_megatron.plan.generation_time import full_length_responses, kv_bytes
from fipo_megatron.plan.rank_memory import RankMemory
from fipo_megatron.rollout.engine_factory import longest_request
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

GIB = 2**30
CONTEXT_BYTES = int(1.2 * GIB)
"""Allowance for the CUDA context, loaded kernels and the workspace of cuBLAS: assumed."""
GROUP_BYTES = int(0.3 * GIB)
"""Allowance for NCCL's buffers per kind of group that has several ranks: assumed."""
FRAGMENTED = 0.05
"""Allowance for unused parts of the allocator's blocks, as a fraction of what is allocated: assumed. Traced peaks of
one GPU were 2.6 % below to 5.4 % above the measured ones (benchmarks/results/plan_memory.json)."""
SLEEPING_ENGINE_BYTES = 2 * GIB
"""Allowance for what a colocated server keeps while the actor works: context and communication buffers; assumed."""

PARTS = (
    *("parameters", "gradients", "optimizer", "FP8 copies", "activations", "temporary", "stored log-probs"),
    *("weights", "KV cache", "reserve", "sleeping server", "allowance"),
)
"""Names of the parts of a phase, in the order of tables."""

_WEIGHT_BYTES = 2


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of a GPU during one phase.

    Attributes:
        name: ``log_probs``, ``update``, ``optimizer``, ``sync`` or ``generate``.
        parts: Bytes by part.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one kind of GPU over a step.

    Attributes:
        name: Kind of the rank, or ``server``.
        phases: Phases of the step.
    """

    name: str
    phases: tuple[PhaseMemory, ...]

    @property
    def largest(self) -> PhaseMemory:
        """Phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.total)


def trainer_memory(
    name: str, traced: RankMemory, config: Config, architecture: Architecture, data_parallel_size: int
) -> GpuMemory:
    """Returns the memory of a GPU of the trainer in the passes of a step and while weights are sent.

    Args:
        name: Kind of the rank.
        traced: Memory of the actor.
        config: Configuration of the run.
        architecture: Architecture of the model.
        data_parallel_size: Data-parallel size.
    """
    kept = {
        "parameters": traced.parameters,
        "gradients": traced.gradients,
        "optimizer": traced.optimizer,
        "FP8 copies": traced.weight_copies,
    }
    colocated = config.rollout.engine == "sglang" and config.rollout.servers.colocated and has_engine(config)
    sleeping = {"sleeping server": SLEEPING_ENGINE_BYTES if colocated else 0}
    stored = {"stored log-probs": _stored_log_probs(config, data_parallel_size)}

    def phase(name: str, held: int, peak: int, more: dict[str, int]) -> PhaseMemory:
        found = kept | {"activations": held, "temporary": peak - held} | more | sleeping
        parts = {part: found[part] for part in PARTS if found.get(part)}
        allowance = CONTEXT_BYTES + _groups(config, data_parallel_size) * GROUP_BYTES
        return PhaseMemory(name, parts | {"allowance": allowance + int(FRAGMENTED * sum(parts.values()))})

    passes = {"log_probs": traced.log_probs, "update": traced.update, "optimizer": traced.optimizer_step}
    phases = [phase(name, found.held, found.peak, stored) for name, found in passes.items()]
    if has_engine(config):
        buckets = 2 * config.rollout.servers.bucket_mib * 2**20 if config.rollout.engine == "sglang" else 0
        phases.append(phase("sync", 0, buckets, {}))
    return GpuMemory(name, tuple(phases))


def server_memory(config: Config, architecture: Architecture, gpu_bytes: int) -> GpuMemory:
    """Returns the memory of a GPU of a server: weights, a cache in what is left, and SGLang's reserve.

    The cache holds one response of full length at least, also where there is no room for it.
    """
    tensor = int(config.rollout.sglang.get("tp_size", 1))
    weights = tables.parameter_count(architecture) * _WEIGHT_BYTES // tensor
    usable = int(usable_gib(config, gpu_bytes / GIB) * GIB)
    cache = max(usable - weights, kv_bytes(architecture, tensor) * longest_request(config))
    reserve = gpu_bytes - usable
    return GpuMemory("server", (PhaseMemory("generate", {"weights": weights, "KV cache": cache, "reserve": reserve}),))


def responses_per_server(config: Config, architecture: Architecture, gpu_gib: float) -> int:
    """Returns how many responses of full length, prompt included, a server's KV cache holds at the same time."""
    tensor = int(config.rollout.sglang.get("tp_size", 1))
    return full_length_responses(architecture, tensor, usable_gib(config, gpu_gib), longest_request(config))


def usable_gib(config: Config, gpu_gib: float) -> float:
    """Returns a GPU's memory for weights and cache of a server, in GiB: ``mem_fraction_static``, or less a reserve."""
    fraction = config.rollout.sglang.get("mem_fraction_static")
    return gpu_gib * float(fraction) if fraction is not None else gpu_gib - TABLE["engine_reserve"].value


def has_engine(config: Config) -> bool:
    """Returns whether the run samples responses."""
    return config.algorithm.kind != "sft" and not config.run.replay


def _groups(config: Config, data_parallel_size: int) -> int:
    parallel = config.actor.parallel
    sizes = (parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.expert_parallel)
    return sum(size > 1 for size in (*sizes, data_parallel_size))


def _stored_log_probs(config: Config, data_parallel_size: int) -> int:
    """Returns the bytes of log-probs and entropies of a whole step on one rank, if every response has full length."""
    if config.algorithm.kind == "sft":
        return 0
    responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    tokens = responses * longest_request(config)
    values = 2 + 2 * bool(config.algorithm.kl_coef)
    return 4 * values * tokens // (data_parallel_size * config.actor.parallel.context_parallel)
