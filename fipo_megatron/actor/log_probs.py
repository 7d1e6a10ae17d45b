"""Log-prob and entropy of the labels from hidden states, with the vocabulary of the output layer split over ranks.

Logits of 32k tokens over 152k columns take 20 GB in float32, and a plain softmax keeps several copies. Here tokens are
processed in chunks: forward keeps four numbers per token, backward recomputes the logits of a chunk. A rank never holds
more than ``[chunk_tokens, V]``. The cost is one more matrix product in backward (four instead of three).

Across the tensor-parallel group a softmax needs four numbers per token and rank: the largest logit, the sum of the
exponentials relative to it, the label's logit and, for the entropy, the weighted sum of logits. They are gathered once
for the whole sequence and merged by every rank in the same order. This is one collective per forward pass, where
all-reducing the maximum and then the sums would be two per chunk, and every rank gets the same bits.

Logical shapes, as suffixes of names: T tokens of this rank, C tokens of a chunk, H hidden, V columns of the vocabulary
on this rank, R ranks of the tensor-parallel group, K statistics per token; S, B as in Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs and entropies of the policy at each label.

    Attributes:
        log_probs: log π of the label in nats, ≤ 0, in the shape of the labels, float32 (float64 for float64 input). A
            label outside the true vocabulary has probability 0: −inf.
        entropy: Entropy of the (tempered) distribution in nats, ≥ 0, same shape and dtype; None if not requested.
    """

    log_probs: Tensor
    entropy: Tensor | None

    def detach(self) -> TokenLogProbs:
        """Returns the same values without their graph."""
        return TokenLogProbs(self.log_probs.detach(), None if self.entropy is None else self.entropy.detach())


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """Computes ``log_softmax(hidden @ weight.T / temperature)[label]`` for every token, in chunks.

    The logits of a chunk are computed in the dtype of the input, their softmax in float32 (float64 for float64 input).
    Nothing of size tokens × vocabulary is kept for backward. The log-probs are bitwise independent of ``with_entropy``
    and of whether a gradient is recorded.

    Gradients: that of ``weight`` is complete for this rank's rows. That of ``hidden`` is the PARTIAL sum over this
    rank's columns and must be summed over ``group``, as for Megatron's ColumnParallelLinear, whose input passes through
    a mapping function that does this. :func:`megatron_token_log_probs` is this function behind that mapping.

    Memory: :func:`chunk_tokens_within` covers the logits. The gradient of ``weight`` takes ``[V, H]`` and, for weights
    below float32 and more than one chunk, also a float32 sum of that shape (4 · V · H bytes) and the product of a chunk
    while backward runs.

    Args:
        hidden: ``[..., H]``, floating point; the same on all ranks of ``group``.
        weight: ``[V, H]``, the dtype of ``hidden``: rank r's rows r·V … (r+1)·V of the output layer.
        labels: ``[...]`` int64, ids in the whole vocabulary; the same on all ranks. Masked tokens may have any id.
        temperature: Divisor of the logits before the softmax, > 0.
        chunk_tokens: Tokens per chunk, C.
        group: The tensor-parallel group; None if ``weight`` is the whole output layer.
        vocab_size: True size of the vocabulary. Later columns are padding: their logits are not computed.
        with_entropy: Also compute the entropy. Its exact gradient costs extra only if a gradient arrives for it.

    Returns:
        Log-probs and entropy, in the shape of ``labels``, on every rank of ``group``.

    Raises:
        ValueError: ``labels`` not one per token; temperature, chunk or vocabulary size out of range.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected one per token, {list(hidden.shape[:-1])}, got {list(labels.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: must be > 0 and finite, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: must be >= 1, got {chunk_tokens}")
    head = _Head.build(weight.shape[0], vocab_size, temperature, chunk_tokens, group)
    flat_TH = hidden.reshape(-1, hidden.shape[-1])
    # torch's stub of apply has no types.
    log_probs_T, entropy_T = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        flat_TH, weight, labels.reshape(-1), head, with_entropy
    )
    return TokenLogProbs(log_probs_T.view(labels.shape), None if entropy_T is None else entropy_T.view(labels.shape))


def megatron_token_log_probs(
    hidden_SBH: Tensor,
    weight: Tensor,
    labels_BS: Tensor,
    *,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """Computes :func:`token_log_probs` with Megatron's conventions, in place of its output layer and cross entropy.

    The input passes through the mapping of ColumnParallelLinear (``tensor_parallel/mappings.py``): an identity whose
    backward is one all-reduce or, under sequence parallelism, an all-gather whose backward is a reduce-scatter. The
    gradient of ``hidden_SBH`` is therefore complete.

    Megatron's ``overlap_param_gather`` waits for a parameter in a hook before the ``forward`` of its module. This
    function does not call the output layer, so with that option it must be called within the ``forward`` of that layer.

    Args:
        hidden_SBH: Output of the decoder, ``[S, B, H]``; under sequence parallelism ``[S / R, B, H]``.
        weight: This rank's ``[V, H]`` of the output layer (or the tied embedding).
        labels_BS: ``[B, S]`` int64, already shifted.
        group: The tensor-parallel group, also if it has one rank.
        sequence_parallel: Whether ``hidden_SBH`` is split along S over ``group``.
        temperature: Divisor of the logits, as in :func:`token_log_probs`.
        chunk_tokens: Tokens per chunk, C.
        vocab_size: True size of the vocabulary.
        with_entropy: Also compute the entropy.

    Returns:
        Log-probs and entropy, ``[B, S]``, on every rank of ``group``.
    """
    # Imported here: the import takes seconds, and nothing else in this file needs it.
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True, group=group)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    result = token_log_probs(
        hidden_SBH,
        weight,
        labels_BS.t(),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        group=group,
        vocab_size=vocab_size,
        with_entropy=with_entropy,
    )
    entropy_BS = None if result.entropy is None else result.entropy.t().contiguous()
    return TokenLogProbs(result.log_probs.t().contiguous(), entropy_BS)


@dataclass(frozen=True)
class _Head:
    """This rank's columns of the softmax and the settings of its computation.

    Attributes:
        first_column: Id of the first column.
        num_columns: Number of columns that are not padding; the last ranks may have none.
        temperature: Divisor of the logits.
        chunk_tokens: Tokens per chunk.
        group: Tensor-parallel group; None for one rank.
    """

    first_column: int
    num_columns: int
    temperature: float
    chunk_tokens: int
    group: dist.ProcessGroup | None

    @classmethod
    def build(
        cls,
        columns: int,
        vocab_size: int | None,
        temperature: float,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
    ) -> _Head:
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        vocab_size = size * columns if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= size * columns:
            raise ValueError(f"vocab_size: must be in 1 … {size * columns} (columns on all ranks), got {vocab_size}")
        real = min(max(vocab_size - rank * columns, 0), columns)
        return cls(rank * columns, real, temperature, chunk_tokens, group if size > 1 else None)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yields the tokens of each chunk; nothing if every column is padding."""
        starts = range(0, num_tokens if self.num_columns else 0, self.chunk_tokens)
        return (slice(start, min(start + self.chunk_tokens, num_tokens)) for start in starts)

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """Computes the tempered logits of the real columns, ``[C, V]``, float32 or float64, in a new buffer."""
        logits_CV = hidden_CH @ weight_VH[: self.num_columns].t()
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        return logits_CV if self.temperature == 1 else logits_CV.div_(self.temperature)

    def columns_of(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each label's column, ``[C]``, any valid one for other ranks' labels, and the mask of local labels."""
        column_C = labels_C - self.first_column
        here_C = (column_C >= 0) & (column_C < self.num_columns)
        return column_C.clamp(0, self.num_columns - 1), here_C


class _TokenLogProbs(torch.autograd.Function):
    """Autograd function with two outputs of one softmax; the second is None without entropy."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, head: _Head, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        local_KT = _local_statistics(hidden_TH, weight_VH, labels_T, head, with_entropy)
        max_T, log_sum_T, log_probs_T, entropy_T = _merge(_gather(local_KT, head.group))
        # Maximum and logarithm are kept separately: their float32 sum would lose 1e-3 at logits of 1e4.
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, max_T, log_sum_T, entropy_T)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return log_probs_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, max_T, log_sum_T, entropy_T = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        if grad_log_probs_T is None:
            grad_log_probs_T = torch.zeros_like(max_T)
        head, real = ctx.head, slice(0, ctx.head.num_columns)
        grad_hidden_TH = torch.zeros_like(hidden_TH, memory_format=torch.contiguous_format) if wants_hidden else None
        one_chunk = hidden_TH.shape[0] <= head.chunk_tokens
        sum_dtype = weight_VH.dtype if one_chunk else torch.promote_types(weight_VH.dtype, torch.float32)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if wants_weight else None

        for rows in head.chunks(hidden_TH.shape[0]):
            log_p_CV = head.logits(hidden_TH[rows], weight_VH)
            log_p_CV.sub_(max_T[rows, None]).sub_(log_sum_T[rows, None])
            entropy_terms = None if grad_entropy_T is None else (grad_entropy_T[rows], entropy_T[rows])
            column_C, here_C = head.columns_of(labels_T[rows])
            grad_CV = _logits_gradient(log_p_CV, column_C, here_C, grad_log_probs_T[rows], entropy_terms)
            del log_p_CV
            if head.temperature != 1:
                grad_CV.div_(head.temperature)
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_TH is not None:
                torch.mm(grad_CV, weight_VH[real], out=grad_hidden_TH[rows])
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[real], grad_CV.t(), hidden_TH[rows])
            del grad_CV
        return grad_hidden_TH, None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype), None, None, None


def _local_statistics(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, head: _Head, with_entropy: bool
) -> Tensor:
    """Computes max, Σ exp(z − max), the label's z or −inf and, with entropy, Σ exp(z − max)(z − max) of local columns.

    Returns:
        ``[K, T]``, K = 3 or 4. Without a real column: −inf, 0, −inf, 0.
    """
    shape = (3 + with_entropy, hidden_TH.shape[0])
    local_KT = hidden_TH.new_zeros(shape, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
    local_KT[0:3:2] = -math.inf
    for rows in head.chunks(hidden_TH.shape[0]):
        logits_CV = head.logits(hidden_TH[rows], weight_VH)
        column_C, here_C = head.columns_of(labels_T[rows])
        local_KT[2, rows] = logits_CV.gather(1, column_C[:, None])[:, 0].masked_fill_(~here_C, -math.inf)
        local_KT[0, rows] = max_C = logits_CV.amax(1)
        logits_CV.sub_(max_C[:, None])
        exp_CV = logits_CV.exp() if with_entropy else logits_CV.exp_()
        local_KT[1, rows] = exp_CV.sum(1)
        if with_entropy:
            local_KT[3, rows] = exp_CV.mul_(logits_CV).sum(1)
        del logits_CV, exp_CV
    return local_KT


def _gather(local_KT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers the statistics of all ranks, ``[R, K, T]``: the only collective of the forward pass."""
    if group is None:
        return local_KT[None]
    size, (kinds, tokens) = dist.get_world_size(group), local_KT.shape
    gathered = local_KT.new_empty(size * kinds, tokens)  # gloo supports ranks along the first dimension only
    dist.all_gather_into_tensor(gathered, local_KT, group=group)
    return gathered.view(size, kinds, tokens)


def _merge(statistics_RKT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Merges the softmax statistics of all ranks.

    With M the largest maximum and E = Σ p (z − M): log π = (z_label − M) − log Σ exp(z − M), entropy = log Σ − E.

    Returns:
        M, log Σ exp(z − M), the log-probs and the entropy (None for K = 3), each ``[T]``.
    """
    max_RT, sum_RT, label_RT, *weighted = statistics_RKT.unbind(1)
    max_T = max_RT.amax(0)
    # A rank with only padding has −inf. A finite bound keeps 0 · distance at 0, and NaN stays NaN.
    distance_RT = (max_RT - max_T).clamp(min=torch.finfo(max_RT.dtype).min)
    scale_RT = distance_RT.exp()
    sum_T = (sum_RT * scale_RT).sum(0)
    log_sum_T = sum_T.log()
    log_probs_T = (label_RT.amax(0) - max_T) - log_sum_T
    if not weighted:
        return max_T, log_sum_T, log_probs_T, None
    expectation_T = ((weighted[0] + sum_RT * distance_RT) * scale_RT).sum(0) / sum_T
    return max_T, log_sum_T, log_probs_T, log_sum_T - expectation_T


def _logits_gradient(
    log_p_CV: Tensor,
    column_C: Tensor,
    here_C: Tensor,
    grad_log_probs_C: Tensor,
    entropy_terms: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Computes the gradient with respect to the tempered logits; overwrites ``log_p_CV``.

    ∂ log π / ∂z_j = 1[j = label] − p_j. From H = lse − Σ p z: ∂H/∂z_j = p_j − (p_j + p_j (z_j − Σ p z)), and with
    z_j − lse = log p_j and Σ p z − lse = −H this is −p_j (log p_j + H).

    Args:
        log_p_CV: log p of every local column.
        column_C: Column of the label if ``here_C``.
        here_C: Whether the label is on this rank.
        grad_log_probs_C: Upstream gradient of log π.
        entropy_terms: Upstream gradient of H, and H, ``[C]`` each; None if no gradient arrived for H.
    """
    if entropy_terms is None:
        grad_CV = log_p_CV.exp_().mul_(-grad_log_probs_C[:, None])
    else:
        grad_entropy_C, entropy_C = entropy_terms
        p_CV = log_p_CV.exp()
        factor_CV = log_p_CV.add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None])
        grad_CV = factor_CV.sub_(grad_log_probs_C[:, None]).mul_(p_CV)
    token_C = torch.arange(grad_CV.shape[0], device=grad_CV.device)
    # One entry per row: reading, adding and writing is deterministic on every device, unlike scatter_add.
    grad_CV[token_C, column_C] += torch.where(here_C, grad_log_probs_C, 0)
    return grad_CV


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes ``total += left @ right``; the product has its own dtype if that of ``total`` is wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
