"""Packed micro-batches as the tensors that a rank passes to Megatron and to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.algorithm.future_kl import SequenceShards
from fipo_megatron.data.packing import MicroBatch, pack
from fipo_megatron.data.trajectory import Trajectory


@dataclass(frozen=True)
class LocalMicroBatch:
    """The part of a packed micro-batch that one context-parallel rank holds, on its device.

    Attributes:
        tokens: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64, positions in the whole sequences.
        labels: ``[1, T]`` int64, the token after each position.
        mask: ``[T]`` bool, true if the label is in the loss.
        padding: ``[1, T]`` bool, true for padding.
        advantages: ``[T]`` float32.
        behaviour_log_probs: ``[T]`` float32.
        packed_seq_params: Boundaries of the whole padded sequences. Padding is at the end of its sequence, where causal
            attention hides it from every real token.
        shards: Positions of this rank's chunks in their sequences.
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor
    padding: Tensor
    advantages: Tensor
    behaviour_log_probs: Tensor
    packed_seq_params: PackedSeqParams
    shards: SequenceShards


def local_micro_batches(
    members: Sequence[MicroBatch],
    trajectories: Mapping[int, Trajectory] | Sequence[Trajectory],
    layout: RankLayout,
    *,
    token_multiple: int = 1,
    mask_truncated: bool = False,
    boundaries_on_host: bool = False,
) -> Iterator[LocalMicroBatch]:
    """Packs the micro-batches of this data-parallel rank and yields them one by one.

    Args:
        members: Indices of the trajectories of each micro-batch; empty for a filler.
        trajectories: Trajectories by index; only those of ``members`` are read.
        layout: Layout of this rank.
        token_multiple: Divisor of the number of tokens per context-parallel rank.
        mask_truncated: Whether truncated responses are left out of the loss (:func:`.data.packing.pack`).
        boundaries_on_host: Whether ``cu_seqlens`` stays on the host, where Megatron's unfused rope and our attention
            read it; Transformer Engine reads it on the device.
    """
    device = layout.device
    for micro_batch in members:
        whole = pack(
            [trajectories[i] for i in micro_batch],
            layout.context,
            multiple_of=token_multiple,
            mask_truncated=mask_truncated,
        )
        part = whole.slice(layout.context)
        cu_seqlens = torch.from_numpy(whole.cu_seqlens)
        if not boundaries_on_host:
            cu_seqlens = cu_seqlens.to(device)
        longest = int((whole.cu_seqlens[1:] - whole.cu_seqlens[:-1]).max())
        # Padding belongs to its sequence. Boundaries of padded sequences beside these would make Transformer Engine
        # compare the two, which waits for the device twice in every layer.
        packed_seq_params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        packed_seq_params.cu_seqlens_host = tuple(whole.cu_seqlens.tolist())  # saves a device sync in every layer
        yield LocalMicroBatch(
            tokens=torch.from_numpy(part.tokens)[None].to(device),
            position_ids=torch.from_numpy(part.position_ids)[None].to(device),
            labels=torch.from_numpy(part.labels)[None].to(device),
            mask=torch.from_numpy(part.mask).to(device),
            padding=torch.from_numpy(part.padding)[None].to(device),
            advantages=torch.from_numpy(part.advantages).to(device),
            behaviour_log_probs=torch.from_numpy(part.behaviour_log_probs).to(device),
            packed_seq_params=packed_seq_params,
            shards=SequenceShards.build(
                layout.context.chunk_lengths(whole.cu_seqlens), layout.context.owners, layout.context.rank, device
            ),
        )
