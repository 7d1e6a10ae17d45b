"""SwiGLU with a backward pass of its own.

Autograd differentiates operator by operator: it keeps intermediate values, and each derivative is a pass over memory.
This function keeps less and writes gradients where they belong. It computes each value by the operations of autograd,
so the bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_silu(gate_and_value: Tensor) -> Tensor:
    """Computes ``silu(gate) * value`` of ``[..., 2 I]``, the gates before the values: SwiGLU (arXiv 2002.05202).

    Returns:
        ``[..., I]`` in the same dtype.
    """
    activated: Tensor = _GatedSilu.apply(gate_and_value)  # type: ignore[no-untyped-call]  # torch's stub has no types
    return activated


class _GatedSilu(torch.autograd.Function):
    """Keeps the input and the activated gates; the gradients of gates and values are written side by side."""

    @staticmethod
    def forward(ctx: Any, gate_and_value: Tensor) -> Tensor:
        gate, value = gate_and_value.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_and_value, activated)
        return activated * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_and_value, activated = ctx.saved_tensors
        gate, value = gate_and_value.chunk(2, dim=-1)
        grads = torch.empty_like(gate_and_value)
        grad_gate, grad_value = grads.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grads
