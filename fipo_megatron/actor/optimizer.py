"""Megatron's gradient buffers, optimizer and learning-rate schedule around the chunks of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.moe.moe_layer import MoELayer

from fipo_megatron.actor.megatron_config import ddp_config, optimizer_config
from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.config import ActorConfig


def wrap_for_training(chunks: Sequence[HiddenStateGPTModel], actor: ActorConfig) -> list[DistributedDataParallel]:
    """Wraps the chunks with gradient buffers that are reduced over data- and context-parallel ranks.

    Sets the functions that Megatron's schedules read from the chunks' ``config``: ``finalize_model_grads_func``,
    without which the gradients of norms under tensor parallelism and of tied embeddings under pipeline parallelism are
    wrong, and ``no_sync_func`` for overlapped reduction. Marks the parameters of experts for the gradient norm.
    """
    config = chunks[0].config
    mark_expert_parameters(chunks)
    wrapped = [
        # Only the first chunk's gradients are final early enough for buckets to overlap anything.
        DistributedDataParallel(config, ddp_config(actor), chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if actor.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def mark_expert_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Marks the parameters of the experts as split over ranks, as Megatron's own layers do.

    The gradient norm leaves out an unmarked parameter on every tensor-parallel rank but the first, as a copy
    (``param_is_not_tensor_parallel_duplicate`` in ``tensor_parallel/layers.py``). Transformer Engine's GroupedLinear
    does not mark its parameters from version 2.13 on.
    """
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MoELayer):
                for parameter in layer.experts.parameters():
                    setattr(parameter, "tensor_model_parallel", True)  # noqa: B010 - Megatron's own attribute


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel], actor: ActorConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Builds the optimizer, with weight decay on matrices only, and the schedule that sets its rates.

    The schedule counts the steps taken *and* the next one. Call ``schedule.step(1)`` before each ``optimizer.step()``:
    the first of W warm-up steps then has learning rate lr / W, not 0, and the W-th has lr.

    Returns:
        The optimizer and its schedule. The schedule has set every group's learning rate and weight decay once, with
        learning rate 0 if there is a warm-up. Megatron's ``wd_mult`` has no effect before that.
    """
    config, own = optimizer_config(actor), actor.optimizer
    optimizer = get_megatron_optimizer(config, list(wrapped), config_overrides=get_standard_config_overrides(config))
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=own.lr,
        min_lr=own.min_lr,
        lr_warmup_steps=own.warmup_steps,
        # Has no effect on a constant rate, but Megatron asserts that it exceeds the warm-up.
        lr_decay_steps=own.warmup_steps + 1 if own.schedule == "constant" else own.decay_steps,
        lr_decay_style=own.schedule,
        start_wd=own.weight_decay,
        end_wd=own.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The step count comes from the checkpoint, the schedule from the configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, schedule
