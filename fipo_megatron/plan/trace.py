"""Traces the actor of one rank on fake tensors. Runs in a process of its own: the process cannot train afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import local_parameters
from fipo_megatron.config import Config
from fipo_megatron.config.padding import micro_batch_multiple
from fipo_megatron.plan import fake_world, stand_ins
from fipo_megatron.plan.memory_count import longest_mini_batch, measure
from fipo_megatron.plan.rank_memory import RankMemory
from fipo_megatron.weights.architecture import Architecture

Layers = Literal["transformer_engine", "torch", "cpu"]
"""Kind of the layers: stand-ins for those of Transformer Engine, or Megatron-Core's and ours as they run on a GPU
without it, or on a CPU."""
_FUSED_FIELDS: dict[Layers, dict[str, Any]] = {
    "transformer_engine": {"bias_activation_fusion": True, "use_te_activation_func": False, "apply_rope_fusion": True},
    "torch": {"bias_activation_fusion": True, "use_te_activation_func": False},
    "cpu": {},
}
_DEVICE_FIELDS = ("transformer_impl", "moe_grouped_gemm", "moe_permute_fusion")


def trace_rank(
    config: Config, architecture: Architecture, rank: int, world_size: int, micro_batches: int, layers: Layers
) -> RankMemory:
    """Builds the actor of a rank and counts the memory of one step on it.

    Args:
        config: Configuration of the run.
        architecture: Architecture of the model.
        rank: Rank among the trainer's ranks.
        world_size: Number of the trainer's ranks.
        micro_batches: Micro-batches of the mini-batch, each as long as the token budget.
        layers: Kind of the layers.

    Raises:
        ValueError: see :class:`.MegatronActor` and :func:`.parallel.initialize`.
        RuntimeError: the table of weights does not fit the model (:func:`.hf_weights.local_parameters`).
    """
    _adapt(layers)
    layout = parallel.initialize(
        config.actor.parallel,
        config.seed,
        fake_world.environment(rank, world_size),
        start_process_group=fake_world.start_process_group,
    )
    try:
        with fake_world.fake_tensors():
            actor = MegatronActor(
                _traced_config(config, layers),
                architecture,
                layout,
                # Raises where a parameter has no tensor of the Hugging Face model, or another shape.
                lambda chunks: deque(local_parameters(chunks, architecture, layout), maxlen=0).clear(),
            )
            copies = []
            if layers == "transformer_engine":
                copies = stand_ins.replace_layers(actor.chunks, _fp8_layers(config, architecture))
                stand_ins.fuse_optimizer(actor.optimizer)
            fake_world.balance_experts(actor.chunks)
            budget = config.actor.token_budget // (multiple := micro_batch_multiple(config.actor)) * multiple
            return measure(actor, *longest_mini_batch(budget, micro_batches, layout.data_size), copies)
    finally:
        parallel.destroy()


@cache
def _adapt(layers: Layers) -> None:
    fake_world.install()
    if layers != "cpu":
        stand_ins.install()


def _traced_config(config: Config, layers: Layers) -> Config:
    """Returns the configuration with which Megatron-Core's own layers are built on a CPU.

    All micro-batches are equally long, so the shapes of their activations are not sent between pipeline stages.
    """
    transformer: dict[str, Any] = {k: v for k, v in config.actor.transformer.items() if k not in _DEVICE_FIELDS}
    transformer |= {"variable_seq_lengths": False} | _FUSED_FIELDS[layers]
    return replace(config, actor=replace(config.actor, fp8="off", transformer=transformer))


def _fp8_layers(config: Config, architecture: Architecture) -> Callable[[int], bool]:
    edge = config.actor.fp8_bf16_first_last
    return lambda number: config.actor.fp8 != "off" and edge < number <= architecture.layers - edge
