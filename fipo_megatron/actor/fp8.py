"""State that Transformer Engine keeps between FP8 passes: scales and amax history of delayed scaling, weight copies.

Delayed scaling derives a tensor's scale from the maxima of earlier passes. Transformer Engine's kernels record maxima
in every pass (row 0 of ``amax_history``), but compute scales from them only at the end of a forward region that records
gradients (``FP8GlobalStateManager``, in ``quantization.py``; ``fp8.py`` before 2.9). A log-prob pass therefore changes
no scale, but its maxima, possibly under other weights, would enter the scales of the next training pass.

Modules are recognised by their attributes, not by class: nothing here imports Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEYS = ("scaling_fwd", "scaling_bwd")
"""Keys of ``fp8_meta`` of Transformer Engine's modules; each holds the state of one module's tensors."""


@contextmanager
def frozen_scaling(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Restores every scale and amax history at the end of the block; state created in the block is reset.

    Does nothing without delayed scaling, which alone has such state.

    Args:
        chunks: Chunks of the model, wrapped or not.
    """
    modules = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
    saved = {id(state): [each.clone() for each in _tensors(state)] for state in _states(modules)}
    try:
        yield
    finally:
        with torch.no_grad():
            for state in _states(modules):
                scale, history = _tensors(state)
                before = saved.get(id(state))
                scale.copy_(before[0]) if before else scale.fill_(1.0)
                history.copy_(before[1]) if before else history.zero_()


def scaling_state(chunks: Iterable[torch.nn.Module]) -> list[Tensor]:
    """Returns scale and amax history of every tensor under delayed scaling: the tensors themselves, not copies."""
    modules = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
    return [tensor for state in _states(modules) for tensor in _tensors(state)]


def drop_weight_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Frees the FP8 copies of the weights; the first micro-batch of the next pass creates them again."""
    for chunk in chunks:
        for module in chunk.modules():
            if copies := getattr(module, "_fp8_workspaces", None):
                copies.clear()


def _states(modules: Iterable[torch.nn.Module]) -> list[Any]:
    """Returns the states under delayed scaling; other recipes keep nothing between passes."""
    metas: list[dict[str, Any]] = [getattr(module, "fp8_meta") for module in modules]  # noqa: B009 - no typed attribute
    states = [meta.get(key) for meta in metas for key in _KEYS]
    return [state for state in states if hasattr(state, "amax_history")]


def _tensors(state: Any) -> tuple[Tensor, Tensor]:
    return state.scale, state.amax_history
