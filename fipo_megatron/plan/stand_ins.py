"""Stand-ins for Transformer Engine's layers, which do not import without CUDA. They keep the same bytes for backward.

The tensors that each layer keeps were read in Transformer Engine 2.11 (``pytorch/module/layernorm_linear.py``,
``linear.py``, ``grouped_linear.py``, ``pytorch/ops/basic/rmsnorm.py``, ``pytorch/attention/rope.py``, and
``dot_product_attention/utils.py`` and ``backends.py``):

- LayerNormLinear keeps its input, the normalised input and one float32 per token (``rsigma``).
- Linear keeps its input. Under sequence parallelism both keep this rank's part and gather it again in backward, as
  Megatron-Core's own layers do.
- In FP8 the input of a matrix product is kept in one byte per value, with a float32 scale per 128 values. Each weight
  has an FP8 copy in both orientations, two bytes per value, from the first pass on.
- RMSNorm keeps its input, copied if it is part of a larger tensor, as queries and keys are of the product of QKV.
- Attention keeps query, key, value, output and one float32 per query and head, like ours (:mod:`.actor.attention`). It
  copies the value, whose strides are not those of the key, so that the product of QKV is freed.
- The rotary embedding keeps angles only. GroupedLinear keeps its input, once for all experts.

Kernels allocate nothing but their outputs here; the plan has an allowance for workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from fipo_megatron.actor.model import HiddenStateGPTModel, SequenceParallelRMSNorm
from fipo_megatron.plan.live_bytes import fused

_SCALE_BLOCK = 128
"""Values that share a scale, in the direction of the tokens, under blockwise scaling."""


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        kept = hidden.contiguous()
        ctx.save_for_backward(kept, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


class NormStandIn(SequenceParallelRMSNorm):
    """RMSNorm that keeps its input, as a tensor of its own, and one float32 per token."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns a tensor of the shape and dtype of the input."""
        out: Tensor = _Norm.apply(hidden, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor) -> Tensor:
        return torch.empty_like(heads, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def fused_rotary(heads: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in for ``fused_apply_rotary_pos_emb_thd``; returns a new tensor like ``heads``, ``[T, N, D]``."""
    out: Tensor = _Rotary.apply(heads)  # type: ignore[no-untyped-call]
    return out


class _Fp8Storage(torch.autograd.graph.saved_tensors_hooks):
    """Block in which matrices of activations are kept for backward in one byte per value, with their scales."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)

    @staticmethod
    def _pack(tensor: Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point() or tensor.ndim < 2:
            return tensor
        size = tensor.numel() + 4 * -(-tensor.numel() // _SCALE_BLOCK)
        return torch.empty(size, dtype=torch.uint8), tensor.shape, tensor.dtype

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        _, shape, dtype = packed
        return torch.empty(1, dtype=dtype).expand(shape)  # the kernels of Transformer Engine read FP8


class NormColumn(ColumnParallelLinear):  # type: ignore[misc]  # Megatron has no types
    """ColumnParallelLinear with a norm before it, as LayerNormLinear: recompute of the MLP includes the norm.

    Attributes:
        norm: The norm; an identity if the layer has none.
        fp8: Whether the input of the matrix product is kept in FP8.
    """

    norm: torch.nn.Module
    fp8: bool

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the norm and the layer."""
        hidden = self.norm(hidden)
        with _Fp8Storage() if self.fp8 else nullcontext():
            return super().forward(hidden, *args, **kwargs)


class Fp8Row(RowParallelLinear):  # type: ignore[misc]  # Megatron has no types
    """RowParallelLinear that keeps its input in FP8."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer."""
        with _Fp8Storage():
            return super().forward(*args, **kwargs)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, *weights)
        return rows.new_empty(len(rows), weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, *weights = ctx.saved_tensors
        return torch.empty(rows.shape, dtype=grad.dtype), *(torch.empty_like(weight) for weight in weights)


class GroupedExperts(SequentialMLP):  # type: ignore[misc]  # Megatron has no types
    """The experts of one rank as grouped matrix products, each of which keeps its input once."""

    def forward(self, rows: Tensor, tokens_per_expert: Any, probs: Tensor) -> tuple[Tensor, None]:
        """Computes all experts on ``[T, hidden]``; ``probs`` ``[T]`` weighs the activations."""
        from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

        inner = _grouped(self, "linear_fc1", rows)
        return _grouped(self, "linear_fc2", weighted_bias_swiglu_impl(inner, None, probs.unsqueeze(-1))), None


def _grouped(experts: GroupedExperts, name: str, rows: Tensor) -> Tensor:
    weights = [getattr(expert, name).weight for expert in experts.local_experts]
    if experts.fp8:
        with _Fp8Storage():
            return _GroupedLinear.apply(rows, *weights)  # type: ignore[no-any-return, no-untyped-call]
    return _GroupedLinear.apply(rows, *weights)  # type: ignore[no-any-return, no-untyped-call]


def replace_layers(chunks: Iterable[HiddenStateGPTModel], fp8_layers: Callable[[int], bool]) -> list[Tensor]:
    """Turns the layers of a model into stand-ins.

    Args:
        chunks: Chunks of the model, with Megatron-Core's own layers.
        fp8_layers: Whether the layer of this number, from 1, computes in FP8.

    Returns:
        The FP8 copies of the weights.
    """
    copies = []
    for chunk in chunks:
        for module in chunk.modules():
            if type(module) is SequenceParallelRMSNorm:
                module.__class__ = NormStandIn
        for layer in chunk.decoder.layers:
            copies += _replace_linear(layer, fp8_layers(layer.layer_number))
    return copies


def _replace_linear(layer: Any, fp8: bool) -> list[Tensor]:
    """Replaces the linear layers and experts of one layer; returns the FP8 copies of their weights."""
    copies = []
    for module in list(layer.modules()):
        if isinstance(module, SequentialMLP):
            module.__class__ = GroupedExperts
            module.fp8 = fp8
        elif isinstance(module, ColumnParallelLinear):
            module.__class__ = NormColumn
            module.norm, module.fp8 = IdentityOp(), fp8
        elif fp8 and isinstance(module, RowParallelLinear):
            module.__class__ = Fp8Row
        if fp8 and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            copies.append(torch.empty(2 * module.weight.numel(), dtype=torch.uint8))
    layer.self_attention.core_attention.register_forward_pre_hook(_copy_value)
    _move_norm(layer, "input_layernorm", layer.self_attention.linear_qkv)
    if isinstance(layer.mlp, MLP):
        _move_norm(layer, "pre_mlp_layernorm", layer.mlp.linear_fc1)
    return copies


def _copy_value(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    query, key, value, *rest = inputs
    return query, key, value.contiguous(), *rest


def _move_norm(layer: Any, name: str, linear: Any) -> None:
    linear.norm = getattr(layer, name)
    setattr(layer, name, IdentityOp())


def install() -> None:
    """Replaces functions that Transformer Engine, Apex or a compiler fuse on a GPU; for the whole process."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb_thd = rope_utils.fused_apply_rotary_pos_emb = fused_rotary
    for name in ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back"):
        setattr(fused_bias_swiglu, name, _fused(getattr(fused_bias_swiglu, name)))


def fuse_optimizer(optimizer: Any) -> None:
    """Lets the steps of Megatron's optimizer count no intermediate tensors, as those of a fused Adam."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        each.optimizer.step = _fused(each.optimizer.step)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with fused():
            return function(*args, **kwargs)

    return call
