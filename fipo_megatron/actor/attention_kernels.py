"""Attention kernels that also return the log-sum-exp of the scores.

Results over different keys merge by their log-sum-exps, and gradients over different keys add up. A kernel therefore
needs no mask except the plain causal one.

Logical shapes, as suffixes of names: B sequences of equal length, N query heads, G key/value heads (N is a multiple of
G), Q queries, K keys, D head dimension.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, key and value."""
_UNBOUNDED = sys.maxsize


class KernelInputs(NamedTuple):
    """Inputs of a kernel. The last dimension of each tensor is contiguous; the others need not be.

    Attributes:
        query: ``[B, N, Q, D]``.
        key: ``[B, G, K, D]``.
        value: ``[B, G, K, D]``.
        causal: Whether query i attends to keys up to i, with Q = K; else it attends to all keys.
        scale: Factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float


class Kernel(Protocol):
    """Exact softmax attention, computed in at least float32, in memory linear in Q and K."""

    @property
    def rows(self) -> int:
        """Largest B · Q of a call with several sequences."""
        ...

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """Computes the attention of the queries.

        Returns:
            The output ``[B, N, Q, D]`` and the log-sum-exp ``[B, N, Q]``, float32 (float64 for float64 inputs).
        """
        ...

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Computes the gradients of the inputs.

        Args:
            inputs: Inputs of the forward call.
            grad: Gradient of the output.
            out: Output over *all* keys that the queries attend to, in this and other calls.
            lse: Log-sum-exp over the same keys.
        """
        ...


@dataclass(frozen=True)
class CpuFlash:
    """PyTorch's flash attention for CPU, the operator under ``scaled_dot_product_attention``: any floating dtype."""

    rows = _UNBOUNDED

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """Implements :meth:`Kernel.forward`."""
        query, key, value, causal, scale = inputs
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return out, lse

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Implements :meth:`Kernel.backward`."""
        query, key, value, causal, scale = inputs
        grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
        return grads


@dataclass(frozen=True)
class CudaFlash:
    """PyTorch's flash attention for CUDA: float16 and bfloat16, head dimensions that are multiples of 8 up to 256."""

    rows = _UNBOUNDED

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """Implements :meth:`Kernel.forward`."""
        query, key, value, causal, scale = inputs
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, lse

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Implements :meth:`Kernel.backward`."""
        query, key, value, causal, scale = inputs
        no_boundaries = (None, None, query.shape[2], key.shape[2])
        random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # for dropout, which is off
        no_dropout = (0.0, causal, random_state, random_state)
        # The kernel ignores the strides of the log-sum-exp and expects it to be contiguous.
        tensors = (grad, query, key, value, out, lse.contiguous())
        grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *tensors, *no_boundaries, *no_dropout, scale=scale
        )
        return grads


@dataclass(frozen=True)
class Blocked:
    """Attention in matrix products of bounded size: any device and dtype.

    Attributes:
        queries: Queries per block.
        keys: Keys per block; a multiple of ``queries``, so that every query of a diagonal block attends to a key of it.
    """

    queries: int = 512
    keys: int = 1024

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1 or self.keys % self.queries:
            raise ValueError(f"keys: must be a multiple of queries, {self.queries}, got {self.keys}")

    @property
    def rows(self) -> int:
        """Implements :attr:`Kernel.rows`: several sequences need no more memory than one block of queries."""
        return self.queries

    def _blocks(self, inputs: KernelInputs) -> Iterator[tuple[slice, list[slice]]]:
        """Yields blocks of queries, each with the blocks of keys that any of its queries attends to."""
        num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
        for first in range(0, num_queries, self.queries):
            last = min(first + self.queries, num_queries)
            seen = last if inputs.causal else num_keys
            yield slice(first, last), [slice(k, min(k + self.keys, num_keys)) for k in range(0, seen, self.keys)]

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """Implements :meth:`Kernel.forward`."""
        query, _, value, _, _ = inputs
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
        for rows, key_blocks in self._blocks(inputs):
            partial = None
            for columns in key_blocks:
                scores = _scores(inputs, rows, columns)
                block_lse = scores.logsumexp(-1)
                block_out = scores.sub_(block_lse[..., None]).exp_() @ value[:, :, None, columns].to(lse.dtype)
                partial = merge(partial, (block_out.flatten(1, 2), block_lse.flatten(1, 2)))
            if partial is not None:
                out[:, :, rows], lse[:, :, rows] = partial
        return out, lse

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Implements :meth:`Kernel.backward`."""
        query, key, value, _, scale = inputs
        wide, groups = lse.dtype, key.shape[1]
        grad_query, grad_key, grad_value = (torch.zeros_like(t, dtype=wide) for t in (query, key, value))
        for rows, key_blocks in self._blocks(inputs):
            grad_rows = grad[:, :, rows].to(wide)
            shift = _by_group((grad_rows * out[:, :, rows].to(wide)).sum(-1, keepdim=True), groups)
            grad_rows, query_rows = _by_group(grad_rows, groups), _by_group(query[:, :, rows].to(wide), groups)
            lse_rows = _by_group(lse[:, :, rows, None], groups)
            for columns in key_blocks:
                weights = _scores(inputs, rows, columns).sub_(lse_rows).exp_()
                grad_value[:, :, columns] += (weights.mT @ grad_rows).sum(2)
                grad_scores = grad_rows @ value[:, :, None, columns].to(wide).mT
                grad_scores = grad_scores.sub_(shift).mul_(weights).mul_(scale)
                grad_query[:, :, rows] += (grad_scores @ key[:, :, None, columns].to(wide)).flatten(1, 2)
                grad_key[:, :, columns] += (grad_scores.mT @ query_rows).sum(2)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges outputs ``[..., D]`` and log-sum-exps ``[...]`` over different keys, in the dtype of the log-sum-exp."""
    if first is None:
        return second
    (first_out, first_lse), (second_out, second_lse) = first, second
    lse = torch.logaddexp(first_lse, second_lse)
    out = first_out * (first_lse - lse).exp_()[..., None] + second_out * (second_lse - lse).exp_()[..., None]
    return out, lse


def choose_kernel(query: Tensor) -> Kernel:
    """Returns the fastest kernel that supports these queries ``[..., D]``."""
    if query.device.type == "cpu":
        return CpuFlash()
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and _has_cuda_flash(query.device):
        return CudaFlash()
    return Blocked()


def _has_cuda_flash(device: torch.device) -> bool:
    built = device.type == "cuda" and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def _scores(inputs: KernelInputs, rows: slice, columns: slice) -> Tensor:
    """Computes the scores of one block, ``[B, G, N / G, Q, K]``; −∞ for keys after a causal query."""
    query, key, _, causal, scale = inputs
    wide = accumulation_dtype(query.dtype)
    scores = _by_group(query[:, :, rows].to(wide), key.shape[1]) @ key[:, :, None, columns].to(wide).mT
    scores.mul_(scale)
    if causal and columns.stop - 1 > rows.start:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(hidden.triu_(1 + rows.start - columns.start), -math.inf)
    return scores


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """Reshapes ``[B, N, ...]`` to ``[B, G, N / G, ...]``."""
    return heads.reshape(len(heads), groups, -1, *heads.shape[2:])
