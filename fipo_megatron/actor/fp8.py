"""What Transformer Engine keeps between passes in FP8: scales and maxima of delayed scaling, copies of the weights.

Delayed scaling takes a tensor's scale from the maxima of earlier passes. Transformer Engine's kernels note maxima in
every pass (row 0 of ``amax_history``), but make scales of them only at the end of a forward region that records
gradients (``FP8GlobalStateManager``, in ``quantization.py``; ``fp8.py`` before 2.9). So a log-prob pass changes no
scale by itself, yet what it saw, other weights included, would enter the scales of the next training pass.

Modules are recognised by what they keep, not by class: nothing here imports Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEYS = ("scaling_fwd", "scaling_bwd")
"""Of ``fp8_meta`` of Transformer Engine's modules; each holds the state of one module's tensors."""


@contextmanager
def frozen_scaling(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Puts every scale and every history of maxima back at the end; state that is made inside is as new.

    Without delayed scaling there is no such state, and nothing happens.

    Args:
        chunks: Of the model, wrapped or not.
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
    """Scale and history of maxima of every tensor under delayed scaling, as they are now: views, not copies."""
    modules = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
    return [tensor for state in _states(modules) for tensor in _tensors(state)]


def drop_weight_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Frees the FP8 copies of the weights, which the first micro-batch of the next pass makes again."""
    for chunk in chunks:
        for module in chunk.modules():
            if copies := getattr(module, "_fp8_workspaces", None):
                copies.clear()


def _states(modules: Iterable[torch.nn.Module]) -> list[Any]:
    """The states under delayed scaling; those of other recipes keep nothing between passes."""
    states = [module.fp8_meta.get(key) for module in modules for key in _KEYS]
    return [state for state in states if hasattr(state, "amax_history")]


def _tensors(state: Any) -> tuple[Tensor, Tensor]:
    return state.scale, state.amax_history
