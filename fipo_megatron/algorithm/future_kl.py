"""Future-KL: the discounted sum of the log-prob shifts from each token to the end of its sequence.

``F_t = Σ_{k≥t} γ^(k−t) x_k`` with ``γ = 2^(−1/τ)`` (arXiv 2603.19835, Eq. 6) is the first-order linear recurrence
``F_t = x_t + γ F_{t+1}``: O(L) work. Under context parallelism each rank scans the chunks that it holds, the ranks
exchange the sums at the chunk heads once, and every rank composes the carries into its own chunks.

Logical shapes, as suffixes of names: T tokens on this rank (packed), S sequences of the micro-batch, C chunks of a
sequence in time order, K chunks of each sequence on one rank, R ranks of the context-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]
"""All-gather: takes a tensor ``[...]``, of the same shape on all R ranks, and returns ``[R, ...]`` in rank order."""

WHOLE_SEQUENCES = ((0, 0),)
"""Owners in a layout without context parallelism: one chunk per sequence, on rank 0."""

_BLOCK = 32


@dataclass(frozen=True)
class SequenceShards:
    """The layout of one rank's packed tokens: which chunks of which sequences they are.

    A sequence is cut into C chunks of equal length (padding included). The rank's tokens are ordered by sequence and,
    within a sequence, by slot: the K chunks of the sequence that the rank holds.

    Attributes:
        chunk_lengths: Tokens in one chunk of each sequence, ``[S]`` int64, on the device of the tokens.
        num_tokens: T, the tokens on this rank: ``K * sum(chunk_lengths)``. Kept on the host to save a device sync.
        owners: ``(rank, slot)`` of each chunk in time order; the same on every rank.
        rank: Rank of this process in the context-parallel group.
    """

    chunk_lengths: Tensor
    num_tokens: int
    owners: tuple[tuple[int, int], ...] = WHOLE_SEQUENCES
    rank: int = 0

    @classmethod
    def build(
        cls,
        chunk_lengths: Sequence[int],
        owners: tuple[tuple[int, int], ...] = WHOLE_SEQUENCES,
        rank: int = 0,
        device: torch.device | str = "cpu",
    ) -> SequenceShards:
        """Checks the layout on the host and moves the lengths to ``device``.

        Raises:
            ValueError: There is no sequence, a chunk has no tokens, the ranks hold different numbers of chunks, or a
                rank holds none.
        """
        if not chunk_lengths or min(chunk_lengths) < 1:
            raise ValueError(f"chunk_lengths: every sequence needs at least one token per chunk, got {chunk_lengths}")
        num_ranks = 1 + max(owner for owner, _ in owners)
        slots = len(owners) // num_ranks
        if sorted(owners) != [(r, k) for r in range(num_ranks) for k in range(slots)] or not 0 <= rank < num_ranks:
            raise ValueError(f"owners: every rank must hold each of its slots once; got rank {rank} of {owners}")
        pinned = torch.device(device).type == "cuda"
        lengths = torch.tensor(list(chunk_lengths), dtype=torch.int64, pin_memory=pinned)
        return cls(lengths.to(device, non_blocking=True), slots * sum(chunk_lengths), owners, rank)

    @property
    def num_ranks(self) -> int:
        """R, the ranks of the context-parallel group."""
        return 1 + max(rank for rank, _ in self.owners)

    @property
    def num_slots(self) -> int:
        """K, the chunks of each sequence on one rank."""
        return len(self.owners) // self.num_ranks

    @property
    def num_sequences(self) -> int:
        """S, the sequences of the micro-batch."""
        return self.chunk_lengths.numel()

    def slot_lengths(self) -> Tensor:
        """Returns the length of each chunk on this rank, in the order of the tokens: ``[S * K]`` int64."""
        return self.chunk_lengths.repeat_interleave(self.num_slots)

    def spread(self, per_sequence_S: Tensor) -> Tensor:
        """Repeats the value of each sequence ``[S]`` for its tokens on this rank: ``[T]``."""
        return per_sequence_S.repeat_interleave(self.chunk_lengths * self.num_slots, output_size=self.num_tokens)

    def count_by_sequence(self, flags_T: Tensor) -> Tensor:
        """Counts the flagged tokens ``[T]`` bool of each sequence on this rank: ``[S]`` int64."""
        ends = (self.chunk_lengths * self.num_slots).cumsum(0)
        totals = torch.nn.functional.pad(flags_T.long().cumsum(0), (1, 0))[ends]
        return totals.diff(prepend=totals.new_zeros(1))

    def count_once(self, flags_S: Tensor) -> Tensor:
        """Counts the flagged sequences on rank 0 and returns 0 on other ranks, so a sum over ranks counts each once."""
        return flags_S.sum() * (self.rank == 0)


def discount(half_life: float) -> float:
    """Returns ``γ = 2^(−1/τ)``, the factor per token that halves a contribution over ``half_life`` tokens; 1 for τ = ∞.

    Raises:
        ValueError: The half-life is not positive.
    """
    if not half_life > 0:
        raise ValueError(f"half_life must be > 0 tokens (inf for no decay), got {half_life}")
    return math.exp2(-1.0 / half_life)


def suffix_scan(values: Tensor, gamma: float, ends: Tensor) -> Tensor:
    """Solves ``y_t = x_t + γ y_{t+1}`` within each segment of a flat tensor, in O(N) work.

    The scan runs in float64. In float32 the rounding of γ alone, raised to distances of a thousand tokens, is an error
    of 1e-5 (seen at τ = 1082).

    Args:
        values: x, ``[N]`` floating point.
        gamma: Discount per position.
        ends: Index of the last position of each segment, int64; no sum crosses it.

    Returns:
        y, ``[N]`` float64. No gradient flows.
    """
    if not values.numel():
        return values.double()
    with torch.no_grad():
        block = min(_BLOCK, values.numel())
        rows = _as_rows(values, block)
        decay = torch.full_like(rows, gamma)
        decay.view(-1).index_fill_(0, ends % block * rows.shape[1] + ends // block, 0.0)
        _scan_rows(rows, decay)
        return rows.t().reshape(-1)[: values.numel()]


def _scan_rows(values: Tensor, decay: Tensor) -> None:
    """Replaces x by y, where ``y_t = x_t + a_t y_{t+1}`` and position t is in row ``t mod K``, column ``t // K``.

    Columns are blocks of K consecutive positions, so every step below is one fused operation on all blocks, over
    contiguous memory. A first sweep computes the head of each block. The heads form a recurrence of the same kind and
    of length N / K, which is solved recursively. A second sweep starts from the head of the following block.
    """
    value_rows, decay_rows = values.unbind(0), decay.unbind(0)
    if values.shape[1] > 1:
        heads = value_rows[-1].clone()
        for value, factor in zip(value_rows[-2::-1], decay_rows[-2::-1], strict=True):
            torch.addcmul(value, factor, heads, out=heads)
        block = min(_BLOCK, heads.numel())
        head_rows = _as_rows(heads, block)
        _scan_rows(head_rows, _as_rows(decay.prod(0), block))
        following = head_rows.t().reshape(-1)[1 : heads.numel()]
        value_rows[-1][:-1].addcmul_(decay_rows[-1][:-1], following)
    for row in range(len(value_rows) - 2, -1, -1):
        value_rows[row].addcmul_(decay_rows[row], value_rows[row + 1])


def _as_rows(flat: Tensor, block: int) -> Tensor:
    """Copies ``[N]`` to float64, padded with zeros: position t in row ``t mod block``, column ``t // block``."""
    padding = -flat.numel() % block
    padded = torch.nn.functional.pad(flat, (0, padding)) if padding else flat
    columns = padded.view(-1, block).t()
    return torch.empty(columns.shape, dtype=torch.float64, device=flat.device).copy_(columns)


def scan_chunks(values_T: Tensor, shards: SequenceShards, half_life: float) -> tuple[Tensor, Tensor]:
    """Scans every chunk on this rank without the contribution of later chunks.

    Args:
        values_T: x, ``[T]``; masked and filtered tokens are 0 and keep their position.
        shards: Layout of the tokens.
        half_life: τ in tokens.

    Returns:
        Sums within each chunk, ``[T]``, and their values at the chunk heads, ``[S, K]``, which the other ranks need.
        Both are float64.
    """
    ends = shards.slot_lengths().cumsum(0)
    sums_T = suffix_scan(values_T, discount(half_life), ends - 1)
    heads_SK = sums_T[ends - shards.slot_lengths()].view(shards.num_sequences, shards.num_slots)
    return sums_T, heads_SK


def chunk_carries(heads_RSK: Tensor, shards: SequenceShards, half_life: float) -> Tensor:
    """Returns the carry into each chunk on this rank: F at the first position after the chunk.

    ``carry_c = head_{c+1} + γ^len · carry_{c+1}``, from the last chunk of the sequence to the first.

    Args:
        heads_RSK: Chunk heads of all ranks, as exchanged, float64.
        shards: Layout of this rank's tokens.
        half_life: τ in tokens.

    Returns:
        Carries, ``[S, K]`` float64; 0 for the last chunk of a sequence.
    """
    decay_S = torch.exp2(-shards.chunk_lengths.double() / half_life)
    carries_S = [torch.zeros_like(decay_S)]
    for rank, slot in shards.owners[:0:-1]:
        carries_S.append(heads_RSK[rank, :, slot] + decay_S * carries_S[-1])
    carries_S.reverse()
    held = [chunk for chunk, (rank, _) in sorted(enumerate(shards.owners), key=lambda e: e[1]) if rank == shards.rank]
    return torch.stack([carries_S[chunk] for chunk in held], dim=1)


def add_carries(sums_T: Tensor, carries_SK: Tensor, shards: SequenceShards, half_life: float) -> Tensor:
    """Returns ``F_t = sum_t + γ^(end − t) · carry``, ``[T]``; ``end`` is the first position after the token's chunk."""
    lengths = shards.slot_lengths()
    carry_T = carries_SK.flatten().repeat_interleave(lengths, output_size=shards.num_tokens)
    end_T = lengths.cumsum(0).repeat_interleave(lengths, output_size=shards.num_tokens)
    distance_T = end_T - torch.arange(shards.num_tokens, device=sums_T.device)
    return torch.addcmul(sums_T, torch.exp2(-distance_T.double() / half_life), carry_T)


def future_kl(
    values: Tensor, half_life: float, shards: SequenceShards | None = None, exchange: Exchange | None = None
) -> Tensor:
    """Returns the discounted suffix sum of ``values`` within each sequence (Eq. 6; Eq. 5 for an infinite half-life).

    Args:
        values: x, either dense ``[..., L]`` (without ``shards``: every row is a sequence) or packed ``[T]``. Masked and
            filtered tokens are 0 and keep their position: distance is counted in token positions.
        half_life: τ in tokens, > 0; ``math.inf`` for no decay.
        shards: Layout of packed tokens.
        exchange: All-gather over the context-parallel group, called once; needed when ``shards`` has several ranks.

    Returns:
        F, in the shape of ``values``, float32 or float64. No gradient flows and nothing is kept for backward.

    Raises:
        ValueError: The half-life is not positive, the length of ``values`` does not match the layout, or the exchange
            is missing or over another number of ranks.
    """
    if shards is None:
        if values.numel() == 0:
            return values.to(torch.promote_types(values.dtype, torch.float32))
        shards = SequenceShards.build([values.shape[-1]] * (values.numel() // values.shape[-1]), device=values.device)
    if values.numel() != shards.num_tokens:
        raise ValueError(f"values: the layout has {shards.num_tokens} tokens on this rank, got {values.numel()}")
    with torch.no_grad():
        sums_T, heads_SK = scan_chunks(values.flatten(), shards, half_life)
        if len(shards.owners) > 1:
            heads_RSK = exchange_over_ranks(heads_SK, shards, exchange)
            sums_T = add_carries(sums_T, chunk_carries(heads_RSK, shards, half_life), shards, half_life)
        return sums_T.to(torch.promote_types(values.dtype, torch.float32)).view_as(values)


def exchange_over_ranks(message: Tensor, shards: SequenceShards, exchange: Exchange | None) -> Tensor:
    """Returns ``exchange(message)``, or the message with a leading dimension of 1 if there is a single rank.

    Raises:
        ValueError: There are several ranks but no exchange, or the exchange is over another number of ranks.
    """
    if shards.num_ranks == 1:
        return message[None]
    if exchange is None:
        raise ValueError(f"exchange: sequences are spread over {shards.num_ranks} ranks; pass gather_over(cp_group)")
    gathered = exchange(message)
    if gathered.shape != (shards.num_ranks, *message.shape):
        raise ValueError(f"exchange: expected {shards.num_ranks} ranks, got a tensor of shape {tuple(gathered.shape)}")
    return gathered


def gather_over(group: dist.ProcessGroup) -> Exchange:
    """Returns the exchange over a process group: one ``all_gather_into_tensor``."""

    def exchange(message: Tensor) -> Tensor:
        ranks, (first, *rest) = dist.get_world_size(group), message.shape
        gathered = message.new_empty(ranks * first, *rest)  # gloo concatenates but does not stack
        dist.all_gather_into_tensor(gathered, message.contiguous(), group=group)
        return gathered.view(ranks, first, *rest)

    return exchange
