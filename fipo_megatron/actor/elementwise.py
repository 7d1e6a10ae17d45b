"""Norm and activation of the layers of torch, with backward passes of their own.

Autograd differentiates operator by operator: it keeps intermediate values, and each derivative is a pass over memory.
These functions keep less and write gradients where they belong. They compute each value by the operations of autograd,
in the same order, so the bits are the same.

Logical shapes: ``...`` are tokens, H is the width of a norm, I that of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divides ``[..., H]`` by its root mean square in float32 and multiplies by ``weight`` in its own dtype.

    Args:
        hidden: ``[..., H]``.
        weight: ``[H]``.
        eps: Constant added to the mean square.

    Returns:
        ``[..., H]`` in the dtype of ``weight * hidden``.
    """
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]  # torch's stub has no types
    return normed


def gated_silu(gate_and_value: Tensor) -> Tensor:
    """Computes ``silu(gate) * value`` of ``[..., 2 I]``, the gates before the values: SwiGLU (arXiv 2002.05202).

    Returns:
        ``[..., I]`` in the same dtype.
    """
    activated: Tensor = _GatedSilu.apply(gate_and_value)  # type: ignore[no-untyped-call]  # torch's stub has no types
    return activated


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = hidden.float()
        grad_hidden = grad_weight = None
        if wants_weight:
            normed = (wide * scale).to(hidden.dtype)
            grad_weight = (grad * normed).sum(tuple(range(grad.ndim - 1)))
        if wants_hidden:
            grad_normed = (grad * weight).to(hidden.dtype).float()
            # The scale is rsqrt of a mean of squares, whose derivatives are -scale³ / 2, 1 / H and 2 · hidden.
            grad_scale = (grad_normed * wide).sum(-1, keepdim=True)
            grad_square = (-0.5 * grad_scale * scale.pow(3)).div_(hidden.shape[-1])
            grad_hidden = (grad_normed.mul_(scale)).add_(wide * grad_square.mul_(2)).to(hidden.dtype)
        return grad_hidden, grad_weight, None


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
