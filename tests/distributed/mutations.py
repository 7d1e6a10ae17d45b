"""Faults that the layout matrix must notice: each is put into a live actor and changes what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.actor import actor as actor_module
from fipo_megatron.actor.router_losses import MiniBatchRouter
from fipo_megatron.algorithm import policy_loss as loss_module

# Fault -> the layout and architecture in which it shows.
SHOWS_IN = {
    "carry zeroed": ("CP2", "qwen3"),
    "loss scaled by cp": ("CP2", "qwen3"),
    "denominator local": ("DP2", "qwen3"),
    "finalize_model_grads skipped": ("TP2", "qwen3"),
    "router losses divided by cp": ("CP2", "qwen3-moe, router losses"),
}


def applies(name: str, layout: str, architecture: str) -> bool:
    return SHOWS_IN[name] == (layout, architecture)


@contextmanager
def applied(name: str | None, actor: Any) -> Iterator[None]:
    """Puts the fault into the actor, or into the module that it calls, until the end of the block."""
    if name is None:
        yield
        return
    if name == "carry zeroed":
        target, attribute, fault = loss_module, "chunk_carries", zero_carries(loss_module.chunk_carries)
    elif name == "loss scaled by cp":
        target, attribute, fault = actor_module, "policy_loss", scaled_loss(actor.layout.context.size)
    elif name == "router losses divided by cp":
        target, attribute, fault = MiniBatchRouter, "_loss", divided_losses(actor.layout.context.size)
    else:
        target, attribute = actor.chunks[0].config, "finalize_model_grads_func"
        fault = local_denominator if name == "denominator local" else only_data_parallel
    original = getattr(target, attribute)
    setattr(target, attribute, fault)
    try:
        yield
    finally:
        setattr(target, attribute, original)


def zero_carries(original: Any) -> Any:
    return lambda *arguments: torch.zeros_like(original(*arguments))


def scaled_loss(factor: int) -> Any:
    def fault(*arguments: Any) -> Any:
        output = loss_module.policy_loss(*arguments)
        return replace(output, numerator=factor * output.numerator)

    return fault


def divided_losses(divisor: int) -> Any:
    original = MiniBatchRouter._loss
    return lambda self, logits, real_T: original(self, logits, real_T) / divisor


def local_denominator(model: list[Any], num_tokens: torch.Tensor, **_: Any) -> None:
    """Divides by the count of each rank, then averages the quotients."""
    for chunk in model:
        chunk.scale_gradients(1.0 / (max(int(num_tokens), 1) * dist.get_world_size()))
        chunk.finish_grad_sync()


def only_data_parallel(model: list[Any], num_tokens: torch.Tensor, **_: Any) -> None:
    """Leaves out the sums over tensor-parallel ranks that the gradients of norms need."""
    for chunk in model:
        chunk.finish_grad_sync()
        chunk.scale_gradients(1.0 / num_tokens)
