"""Divergences between two models at each position, exactly over a vocabulary that is split over ranks.

Positions are processed in chunks: a rank never holds more than ``[C, V]`` numbers of a model. A chunk takes three
gathers over the tensor-parallel group. The first one merges the normalisers and finds the two first choices, the second
one finds the base model's rank of the first choice of RL, the third one merges the sums. Every rank merges in the same
order and gets the same bits.

Logits are computed in the dtype of the model and rounded to float32, everything after them in float64. The divergences
of two models with equal logits are exactly 0.

Logical shapes, as suffixes of names: T positions, C positions of a chunk, V columns of the vocabulary on this rank, H
hidden, R ranks of the tensor-parallel group, K numbers per position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

QUANTITIES = (
    "log_prob_base",
    "log_prob_rl",
    "delta",
    "js",
    "kl",
    "kl_reverse",
    "entropy_base",
    "entropy_rl",
    "rank",
    "overlap",
    "choice_base",
    "choice_rl",
)
"""Numbers per position, in the order of the rows of :func:`divergences`."""

_LARGEST_DISTANCE = 700.0
"""Bound of log π_RL − log π_base inside the JS divergence, below the overflow of exp in float64. Beyond it one of the
two probabilities is below e^-700 and adds nothing."""
_ID_BITS = 32


@dataclass(frozen=True)
class Head:
    """The output layer of one model on this rank.

    Attributes:
        weight: ``[V, H]``, this rank's rows of the output layer.
        hidden: ``[T, H]``, hidden states after the final norm; the same on all ranks of the group.
    """

    weight: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The columns of the vocabulary on this rank.

    Attributes:
        size: Number of tokens of the whole vocabulary; later columns are padding.
        group: Tensor-parallel group; None for one rank.
    """

    size: int
    group: dist.ProcessGroup | None = None

    def first(self, columns: int) -> int:
        """Returns the token id of the first column of a rank with this many columns."""
        return columns * (dist.get_rank(self.group) if self.group is not None else 0)

    def columns(self, columns: int) -> int:
        """Returns how many of this rank's columns are not padding; at least 1 on the first rank."""
        return min(max(self.size - self.first(columns), 0), columns)

    def gather(self, local: Tensor) -> Tensor:
        """Returns the tensors of all ranks, ``[R, …]``."""
        if self.group is None:
            return local[None]
        size = dist.get_world_size(self.group)
        gathered = local.new_empty(size * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(size, *local.shape)


@torch.no_grad()
def divergences(
    base: Head,
    rl: Head,
    labels_T: Tensor,
    vocabulary: Vocabulary,
    *,
    temperature: float = 1.0,
    top_k: int = 10,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Computes the numbers of :data:`QUANTITIES` at every position.

    ``log_prob_base`` and ``log_prob_rl`` are the log-probs of the label in nats and ``delta`` is their difference, RL
    minus base. ``kl`` is KL(π_RL ‖ π_base), ``kl_reverse`` is KL(π_base ‖ π_RL). ``js`` is the Jensen-Shannon
    divergence in nats, at most ln 2. ``rank`` is the rank, from 1, of RL's most likely token in the order of the base
    model. ``overlap`` is the fraction of the k most likely tokens of RL that are among those of the base model.
    ``choice_base`` and ``choice_rl`` are the ids of the most likely tokens. Equal logits are ordered by token id.

    Args:
        base: Output layer and hidden states of the base model.
        rl: Output layer and hidden states of the RL model; its hidden size may differ.
        labels_T: ``[T]`` int64, token ids.
        vocabulary: Columns of this rank, the same for both models.
        temperature: Divisor of the logits of both models, > 0.
        top_k: k of ``overlap``; a larger one than the vocabulary counts the whole vocabulary.
        chunk_tokens: Positions per chunk, C.

    Returns:
        ``[K, T]`` float64, the same on every rank of the group.
    """
    found = labels_T.new_zeros((len(QUANTITIES), len(labels_T)), dtype=torch.float64)
    for start in range(0, len(labels_T), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(labels_T)))
        logits = [_logits(head, rows, vocabulary, temperature) for head in (base, rl)]
        found[:, rows] = _chunk(logits, labels_T[rows], vocabulary, base.weight.shape[0], top_k)
    return found


def _logits(head: Head, rows: slice, vocabulary: Vocabulary, temperature: float) -> Tensor:
    """Returns the tempered logits of the columns that are not padding, ``[C, V]`` float32."""
    weight_VH = head.weight[: vocabulary.columns(head.weight.shape[0])]
    logits_CV = (head.hidden[rows] @ weight_VH.t()).float()
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def _chunk(logits: list[Tensor], labels_C: Tensor, vocabulary: Vocabulary, columns: int, top_k: int) -> Tensor:
    """Returns the numbers of one chunk, ``[K, C]``; consumes the logits."""
    first = vocabulary.first(columns)
    keys = [_ordered_keys(each, first) for each in logits]
    normalisers = [_log_normaliser(each, vocabulary) for each in logits]
    log_base_CV, log_rl_CV = (each.double().sub_(z_C[:, None]) for each, z_C in zip(logits, normalisers, strict=True))
    logits.clear()
    top_base, top_rl = (_top(each, vocabulary, min(top_k, vocabulary.size)) for each in keys)
    choice_C = _token_of(top_rl[:, 0])
    choice_key_C = _pick(keys[0], choice_C - first, vocabulary, torch.iinfo(torch.int64).min)
    label_base_C, label_rl_C = (
        _pick(each, labels_C - first, vocabulary, -math.inf) for each in (log_base_CV, log_rl_CV)
    )
    ahead_C = (keys[0] > choice_key_C[:, None]).sum(1).double()
    keys.clear()
    sums_KC = vocabulary.gather(torch.stack([*_sums(log_base_CV, log_rl_CV), ahead_C])).sum(0)
    js_C, kl_C, kl_reverse_C, entropy_base_C, entropy_rl_C, ahead_C = sums_KC.unbind(0)
    tokens_base, tokens_rl = _token_of(top_base), _token_of(top_rl)
    shared_C = (tokens_rl[:, :, None] == tokens_base[:, None, :]).any(2).double().mean(1)
    return torch.stack(
        [
            label_base_C,
            label_rl_C,
            label_rl_C - label_base_C,
            js_C.clamp(0.0, math.log(2)),
            kl_C.clamp(min=0),
            kl_reverse_C.clamp(min=0),
            entropy_base_C,
            entropy_rl_C,
            ahead_C + 1,
            shared_C,
            tokens_base[:, 0].double(),
            tokens_rl[:, 0].double(),
        ]
    )


def _log_normaliser(logits_CV: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Returns log Σ exp z over all ranks, ``[C]`` float64. A rank with only padding has log 0."""
    if logits_CV.shape[1]:
        local_C = logits_CV.double().logsumexp(1)
    else:
        local_C = logits_CV.new_full((len(logits_CV),), -math.inf, dtype=torch.float64)
    return vocabulary.gather(local_C).logsumexp(0)


def _sums(log_base_CV: Tensor, log_rl_CV: Tensor) -> tuple[Tensor, ...]:
    """Returns this rank's sums of JS, KL, reversed KL and both entropies, ``[C]`` float64 each.

    With d = log π_RL − log π_base and m the mean of both distributions: log(π_RL / m) = −log1p(expm1(−d) / 2) and
    log(π_base / m) = −log1p(expm1(d) / 2), which are exact at d = 0. Each term of a KL is p d − p + q ≥ 0, whose sum is
    Σ p d because both distributions sum to 1; it loses no digits where the models are close.
    """
    base_CV, rl_CV = log_base_CV.exp(), log_rl_CV.exp()
    entropies = [-(p * log_p.clamp(min=torch.finfo(torch.float64).min)).sum(1)
                 for p, log_p in ((base_CV, log_base_CV), (rl_CV, log_rl_CV))]  # fmt: skip
    distance_CV = log_rl_CV - log_base_CV
    kl_C = (rl_CV * distance_CV - rl_CV + base_CV).sum(1)
    kl_reverse_C = (rl_CV - base_CV - base_CV * distance_CV).sum(1)
    distance_CV.clamp_(-_LARGEST_DISTANCE, _LARGEST_DISTANCE)
    js_C = rl_CV.mul_(distance_CV.neg().expm1_().div_(2).log1p_()).sum(1)
    js_C += base_CV.mul_(distance_CV.expm1_().div_(2).log1p_()).sum(1)
    return -js_C / 2, kl_C, kl_reverse_C, *entropies


def _ordered_keys(logits_CV: Tensor, first: int) -> Tensor:
    """Returns integers in the order of the logits, distinct for distinct tokens, ``[C, V]`` int64.

    The upper half is the float's bits as an ordered integer, the lower half decreases with the token id.
    """
    bits_CV = (logits_CV + 0.0).view(torch.int32)  # −0 becomes 0
    keys_CV = torch.where(bits_CV < 0, bits_CV ^ 0x7FFFFFFF, bits_CV).long() << _ID_BITS
    ids_V = torch.arange(first, first + logits_CV.shape[1], device=logits_CV.device)
    return keys_CV.bitwise_or_((1 << _ID_BITS) - 1 - ids_V)


def _token_of(keys: Tensor) -> Tensor:
    """Returns the token ids of keys."""
    mask = (1 << _ID_BITS) - 1
    return mask - (keys & mask)


def _top(keys_CV: Tensor, vocabulary: Vocabulary, count: int) -> Tensor:
    """Returns the largest keys over all ranks in falling order, ``[C, count]``."""
    here = min(count, keys_CV.shape[1])
    local = keys_CV.new_full((len(keys_CV), count), torch.iinfo(torch.int64).min)
    local[:, :here] = keys_CV.topk(here, dim=1).values
    gathered = vocabulary.gather(local)
    return gathered.transpose(0, 1).reshape(len(keys_CV), -1).topk(count, dim=1).values


def _pick(values_CV: Tensor, column_C: Tensor, vocabulary: Vocabulary, missing: float) -> Tensor:
    """Returns the value of one column per position, on whichever rank it is, ``[C]``."""
    here_C = (column_C >= 0) & (column_C < values_CV.shape[1])
    local_C = values_CV.new_full((len(values_CV),), missing)
    if values_CV.shape[1]:
        picked_C = values_CV.gather(1, column_C.clamp(0, values_CV.shape[1] - 1)[:, None])[:, 0]
        local_C = torch.where(here_C, picked_C, local_C)
    return vocabulary.gather(local_C).amax(0)
