"""Attention of some queries to some keys that also returns the log-sum-exp of the scores.

Two results over different keys merge into one by their log-sum-exps, and the gradients over different keys add up: so a
kernel needs to know no mask but the plain causal one.

Logical shapes, as suffixes of names: N query heads, G key/value heads (N is a multiple of G), Q queries, K keys, D head
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""


class KernelInputs(NamedTuple):
    """What a kernel attends from and to. The last dimension of the tensors is contiguous; the others need not be.

    Attributes:
        query: ``[1, N, Q, D]``.
        key: ``[1, G, K, D]``.
        value: ``[1, G, K, D]``.
        causal: Query i sees keys up to i, and Q = K; else it sees all.
        scale: Of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float


class Kernel(Protocol):
    """Exact softmax attention, computed in at least float32, in memory linear in Q and K."""

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """The output ``[1, N, Q, D]`` and the log-sum-exp ``[1, N, Q]``: float32, or float64 for float64 inputs."""
        ...

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """The gradients, given output and log-sum-exp over *all* keys that the queries see, here or in other calls."""
        ...


@dataclass(frozen=True)
class CpuFlash:
    """PyTorch's flash attention for CPU, the operator under ``scaled_dot_product_attention``: any floating dtype."""

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
        query, key, value, causal, scale = inputs
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return out, lse

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """See :class:`Kernel`."""
        query, key, value, causal, scale = inputs
        grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
        return grads


@dataclass(frozen=True)
class CudaFlash:
    """PyTorch's flash attention for CUDA: float16 and bfloat16, head dimensions that are multiples of 8 up to 256."""

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
        query, key, value, causal, scale = inputs
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, lse

    def backward(self, inputs: KernelInputs, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """See :class:`Kernel`."""
        query, key, value, causal, scale = inputs
        no_boundaries = (None, None, query.shape[2], key.shape[2])
        random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout, which is 0
        no_dropout = (0.0, causal, random_state, random_state)
        # The kernel takes the log-sum-exp for contiguous, whatever its strides.
        tensors = (grad, query, key, value, out, lse.contiguous())
        grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *tensors, *no_boundaries, *no_dropout, scale=scale
        )
        return grads


@dataclass(frozen=True)
class Blocked:
    """Attention in matrix products of bounded size: any device and dtype.

    Attributes:
        queries: In one block.
        keys: In one block; a multiple of ``queries``, so that every query of a block on the diagonal sees a key of it.
    """

    queries: int = 512
    keys: int = 1024

    def __post_init__(self) -> None:
        if self.queries < 1 or self.keys < 1 or self.keys % self.queries:
            raise ValueError(f"keys: must be a multiple of queries, {self.queries}, got {self.keys}")

    def _blocks(self, inputs: KernelInputs) -> Iterator[tuple[slice, list[slice]]]:
        """Ranges of queries, each with the ranges of keys that it sees any of."""
        num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
        for first in range(0, num_queries, self.queries):
            last = min(first + self.queries, num_queries)
            seen = last if inputs.causal else num_keys
            yield slice(first, last), [slice(k, min(k + self.keys, num_keys)) for k in range(0, seen, self.keys)]

    def forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
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
        """See :class:`Kernel`."""
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
    """What sums are accumulated in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def merge(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output ``[..., D]`` and log-sum-exp ``[...]`` over the keys of both, in the dtype of the log-sum-exp."""
    if first is None:
        return second
    (first_out, first_lse), (second_out, second_lse) = first, second
    lse = torch.logaddexp(first_lse, second_lse)
    out = first_out * (first_lse - lse).exp_()[..., None] + second_out * (second_lse - lse).exp_()[..., None]
    return out, lse


def choose_kernel(query: Tensor) -> Kernel:
    """The fastest kernel that is valid for these queries ``[..., D]``."""
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
    """The scores of one block, ``[1, G, N / G, Q, K]``, −∞ where a causal query does not see the key."""
    query, key, _, causal, scale = inputs
    wide = accumulation_dtype(query.dtype)
    scores = _by_group(query[:, :, rows].to(wide), key.shape[1]) @ key[:, :, None, columns].to(wide).mT
    scores.mul_(scale)
    if causal and columns.stop - 1 > rows.start:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(hidden.triu_(1 + rows.start - columns.start), -math.inf)
    return scores


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """``[1, N, ...]`` to ``[1, G, N / G, ...]``."""
    return heads.reshape(1, groups, -1, *heads.shape[2:])
