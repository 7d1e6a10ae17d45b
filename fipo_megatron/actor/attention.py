"""Core attention of packed sequences under context parallelism in plain torch, used without Transformer Engine.

A query chunk attends to all earlier chunks of its sequence and, causally, to itself. For every chunk of the zigzag
layout these are at most two ranges of keys, one without a mask and one with the plain causal mask. Each range is one
call of a kernel that also returns the log-sum-exp of its scores, by which the two results are merged. Neighbouring
sequences of equal length share their calls. Nothing of size L × L exists, in forward or backward.

Keys and values of the other ranks are gathered once in forward and again in backward, so only this rank's part is kept
between the two. Their gradients are summed over the ranks in float32.

Logical shapes, as suffixes of names: T tokens on this rank, P tokens of the whole packed micro-batch, R ranks of the
context-parallel group (P = R·T), N query heads, G key/value heads (N is a multiple of G), D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from fipo_megatron.actor.attention_kernels import Kernel, KernelInputs, accumulation_dtype, choose_kernel, merge
from fipo_megatron.actor.rotary import Rotation
from fipo_megatron.algorithm.future_kl import Exchange, gather_over
from fipo_megatron.data.context_parallel import CpLayout

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_NEUTRAL = {
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "attention_dropout": 0.0,
}
"""Fields of ``TransformerConfig`` that change core attention, and the values that leave it as computed here."""


@dataclass(frozen=True)
class KeyValueExchange:
    """Collectives for keys, values and their gradients over a context-parallel group.

    Attributes:
        gather: All-gather, ``[...]`` to ``[R, ...]`` in rank order.
        reduce_scatter: Reduce-scatter, ``[R, ...]`` to ``[...]``: the sum over all ranks of this rank's part.
    """

    gather: Exchange
    reduce_scatter: Exchange


def exchange_over(group: dist.ProcessGroup) -> KeyValueExchange:
    """Returns the collectives of a process group, one each for forward and backward."""

    def reduce_scatter(message: Tensor) -> Tensor:
        mine = torch.empty_like(message[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(mine, message.contiguous().flatten(0, 1), group=group)
        return mine

    return KeyValueExchange(gather_over(group), reduce_scatter)


@dataclass(frozen=True)
class _Rows:
    """The same rows of neighbouring sequences of equal length.

    Attributes:
        first: First row of the first sequence.
        sequences: Number of sequences, B.
        length: Rows of each sequence.
        part: Rows selected in each sequence, Q of them.
    """

    first: int
    sequences: int
    length: int
    part: slice

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a view of ``[T, N, ...]`` as ``[B, N, Q, ...]``."""
        rows = tensor[self.first : self.first + self.sequences * self.length]
        return rows.view(self.sequences, self.length, *rows.shape[1:])[:, self.part].transpose(1, 2)


@dataclass(frozen=True)
class _KeyRange:
    """Queries of this rank, among ``T``, and the keys of the packed micro-batch, among ``P``, that they attend to."""

    queries: _Rows
    keys: _Rows
    causal: bool


def _key_ranges(cu_seqlens: Sequence[int], layout: CpLayout, rows: int) -> list[list[_KeyRange]]:
    """Returns for each chunk on this rank its own keys, causal, then those of the earlier chunks of its sequence.

    Chunks of neighbouring sequences of equal length are one entry, of at most ``rows`` queries or one sequence.
    """
    chunks = []
    lengths = [int(length) for length in layout.chunk_lengths(cu_seqlens)]
    first = number = 0
    while number < len(lengths):
        length = lengths[number]
        most = min(len(lengths), number + max(1, rows // max(1, length)))
        count = next((i for i in range(number, most) if lengths[i] != length), most) - number
        start, whole = cu_seqlens[number], cu_seqlens[number + 1] - cu_seqlens[number]
        held = len(layout.chunks) * length
        for place, chunk in enumerate(layout.chunks):
            queries = _Rows(first, count, held, slice(place * length, (place + 1) * length))
            own = slice(chunk * length, (chunk + 1) * length)
            chunks.append([_KeyRange(queries, _Rows(start, count, whole, own), True)])
            if chunk:
                earlier = slice(0, chunk * length)
                chunks[-1].append(_KeyRange(queries, _Rows(start, count, whole, earlier), False))
        first += count * held
        number += count
    return chunks


@dataclass(frozen=True)
class _Attention:
    """Constants of one call.

    Attributes:
        chunks: Key ranges of each chunk (:func:`_key_ranges`).
        rank_order: ``[P]`` int64, positions of the gathered tokens in the packed micro-batch; None for one rank.
        ranks: Ranks of the context-parallel group, R.
    """

    chunks: list[list[_KeyRange]]
    rank_order: NDArray[np.int64] | None
    ranks: int
    scale: float
    kernel: Kernel
    exchange: KeyValueExchange | None

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers ``[T, G, D]`` of this rank to ``[P, G, D]`` in packed order."""
        if self.exchange is None or self.rank_order is None:
            return key, value
        gathered = self.exchange.gather(torch.stack([key, value], dim=1)).flatten(0, 1)
        packed = torch.empty_like(gathered)
        packed[torch.from_numpy(self.rank_order).to(key.device)] = gathered
        return packed[:, 0], packed[:, 1]

    def scatter(self, grads_P2GD: Tensor) -> Tensor:
        """Sums the gradients ``[P, 2, G, D]`` of all ranks and returns this rank's tokens, ``[T, 2, G, D]``."""
        if self.exchange is None or self.rank_order is None:
            return grads_P2GD
        in_rank_order = grads_P2GD[torch.from_numpy(self.rank_order).to(grads_P2GD.device)]
        return self.exchange.reduce_scatter(in_rank_order.view(self.ranks, -1, *grads_P2GD.shape[1:]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the output ``[T, N, D]`` and the log-sum-exp ``[T, N]``."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))
        keys, values = self.gather(key, value)
        for spans in self.chunks:
            partial = None
            for span in spans:
                partial = merge(partial, self.kernel.forward(self._inputs(span, query, keys, values)))
            if partial is not None:
                rows = spans[0].queries
                rows.of(out).copy_(partial[0])
                rows.of(lse).copy_(partial[1])
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the gradients of the queries, keys and values of this rank."""
        keys, values = self.gather(key, value)
        # Without context parallelism every token is in one range: nothing is summed, so nothing is rounded in between.
        summed = query.dtype if self.exchange is None else accumulation_dtype(query.dtype)
        grad_query = torch.zeros_like(query, dtype=summed, memory_format=torch.contiguous_format)
        grads_P2GD = keys.new_zeros(len(keys), 2, *keys.shape[1:], dtype=summed)
        for span in (span for spans in self.chunks for span in spans):
            inputs, rows = self._inputs(span, query, keys, values), span.queries
            of_query, of_key, of_value = self.kernel.backward(inputs, rows.of(grad), rows.of(out), rows.of(lse))
            rows.of(grad_query).add_(of_query)
            span.keys.of(grads_P2GD[:, 0]).add_(of_key)
            span.keys.of(grads_P2GD[:, 1]).add_(of_value)
        grad_key, grad_value = self.scatter(grads_P2GD).to(key.dtype).unbind(1)
        return grad_query.to(query.dtype), grad_key, grad_value

    def _inputs(self, span: _KeyRange, query: Tensor, keys: Tensor, values: Tensor) -> KernelInputs:
        heads = (span.queries.of(query), span.keys.of(keys), span.keys.of(values))
        return KernelInputs(*heads, span.causal, self.scale)


class _PackedAttention(torch.autograd.Function):
    """Autograd function that keeps queries, keys, values and outputs of this rank and one float per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: _Attention) -> Tensor:
        out, lse = attention.forward(query, key, value)
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.attention.backward(_dense_rows(grad), *ctx.saved_tensors), None


def _dense_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor if its last dimension is contiguous, as the kernels require, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int],
    layout: CpLayout | None = None,
    scale: float | None = None,
    exchange: KeyValueExchange | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Computes exact causal softmax attention within each packed sequence, with grouped queries.

    Padding is at the end of its sequence and computed like any token; no real token attends to it. A collective: every
    rank of the group must call this function, and its backward, with the same ``cu_seqlens``. Forward gathers once;
    backward gathers once and reduce-scatters once. A layout of one rank uses no collective.

    Args:
        query: ``[T, N, D]``, the tokens of this rank in the order of ``layout.indices``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        cu_seqlens: Boundaries ``[S + 1]`` of the whole padded sequences, on the host.
        layout: Rank and size of the context-parallel group; None: one rank.
        scale: Factor on the scores; None: ``D ** -0.5``.
        exchange: Collectives of the context-parallel group; required for a layout of several ranks.
        kernel: Attention kernel; None: that of :func:`choose_kernel`.

    Returns:
        Output ``[T, N, D]`` in the dtype of ``query``.

    Raises:
        ValueError: the shapes do not match each other or the layout, or ``exchange`` is missing.
    """
    layout = layout or CpLayout()
    if query.shape[0] * layout.size != cu_seqlens[-1]:
        raise ValueError(f"query: cu_seqlens has {cu_seqlens[-1]} tokens for {layout.size} ranks, got {query.shape[0]}")
    if key.shape != value.shape or key.shape[::2] != query.shape[::2] or query.shape[1] % key.shape[1]:
        shapes = [tuple(each.shape) for each in (query, key, value)]
        raise ValueError(
            f"query, key, value: expected [T, N, D], [T, G, D], [T, G, D] with N a multiple of G: {shapes}"
        )
    rank_order = None
    if layout.size > 1:
        if exchange is None:
            raise ValueError(f"exchange: keys are spread over {layout.size} ranks; pass exchange_over(cp_group)")
        rank_order = np.concatenate([CpLayout(layout.size, rank).indices(cu_seqlens) for rank in range(layout.size)])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = kernel or choose_kernel(query)
    chunks = _key_ranges(cu_seqlens, layout, kernel.rows)
    attention = _Attention(chunks, rank_order, layout.size, scale, kernel, exchange if layout.size > 1 else None)
    # torch's stub of apply has no types.
    out: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        _dense_rows(query), _dense_rows(key), _dense_rows(value), attention
    )
    return out


class PackedCoreAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """:func:`packed_causal_attention` as a ``core_attention`` module of Megatron-Core.

    Takes the arguments of ``megatron/core/transformer/dot_product_attention.py`` and raises on those that it does not
    support. ``cp_comm_type`` has no effect.

    Raises:
        ValueError: dropout, a window, a mask that is not causal, cross attention, or a softmax other than plain.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        for field, neutral in _NEUTRAL.items():
            found = getattr(config, field)
            if field == "attention_dropout" and attention_dropout is not None:
                found = attention_dropout
            if found != neutral:
                raise ValueError(f"{field}: attention without Transformer Engine needs {neutral!r}, got {found!r}")
        if attention_type != "self":
            raise ValueError(f"attention_type: must be 'self', got {attention_type!r}")
        self.attn_mask_type = attn_mask_type
        self._check_mask_type(None)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        group = getattr(pg_collection, "cp", None)
        self.group: dist.ProcessGroup = parallel_state.get_context_parallel_group() if group is None else group
        self.layout = CpLayout(self.group.size(), self.group.rank())

    def _check_mask_type(self, attn_mask_type: AttnMaskType | None) -> None:
        found = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if found not in _CAUSAL:
            raise ValueError(f"attn_mask_type: must be causal or padding_causal, got {found}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Computes attention of packed or dense input.

        Args:
            query: Packed ``[T, N, D]``, or dense ``[s, b, N, D]`` without ``packed_seq_params``.
            key: ``[T, G, D]`` or ``[s, b, G, D]``.
            value: Like ``key``.
            attention_mask: Must be None.
            attn_mask_type: Causal mask type; None: that of the constructor.
            attention_bias: Must be None.
            packed_seq_params: Boundaries of the whole sequences; the padded ones if both are set. They are copied to
                the host, which waits for the device, unless the object has an attribute ``cu_seqlens_host`` with the
                same numbers as a sequence of int. Queries and keys are first rotated by its attribute ``rotation``
                (:class:`.rotary.Rotation`), if it has one.

        Returns:
            Output ``[T, N·D]`` or ``[s, b, N·D]``.

        Raises:
            ValueError: a mask, a bias, a packed format other than thd, a context-parallel group of this micro-batch
                only, or dense input under context parallelism.
        """
        self._check_mask_type(attn_mask_type)
        for name, given in (("attention_mask", attention_mask), ("attention_bias", attention_bias)):
            if given is not None:
                raise ValueError(f"{name}: must be None; causality and sequence boundaries are all that is applied")
        if packed_seq_params is None:
            return self._dense(query, key, value)
        if packed_seq_params.qkv_format != "thd" or packed_seq_params.local_cp_size not in (None, self.layout.size):
            raise ValueError(
                f"packed_seq_params: qkv_format must be 'thd' and local_cp_size unset: {packed_seq_params}"
            )
        rotation: Rotation | None = getattr(packed_seq_params, "rotation", None)
        if rotation is not None:
            query, key = rotation(query, key)
        return self._packed(query, key, value, _boundaries(packed_seq_params)).flatten(1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        exchange = exchange_over(self.group) if self.layout.size > 1 else None
        return packed_causal_attention(query, key, value, cu_seqlens, self.layout, self.scale, exchange)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Treats every entry of the batch as a sequence of a packed micro-batch."""
        if self.layout.size > 1:
            raise ValueError("packed_seq_params: needed under context parallelism")
        length, batch = query.shape[:2]
        query, key, value = (each.transpose(0, 1).flatten(0, 1) for each in (query, key, value))
        out = self._packed(query, key, value, [length * entry for entry in range(batch + 1)])
        return out.view(batch, length, -1).transpose(0, 1).contiguous()


def _boundaries(packed_seq_params: PackedSeqParams) -> Sequence[int]:
    """Returns the padded boundaries on the host."""
    on_host: Sequence[int] | None = getattr(packed_seq_params, "cu_seqlens_host", None)
    if on_host is not None:
        return on_host
    padded = packed_seq_params.cu_seqlens_q_padded
    tensor = packed_seq_params.cu_seqlens_q if padded is None else padded
    return [int(boundary) for boundary in tensor.tolist()]
