"""Packed micro-batches as the tensors that a rank passes to Megatron and to the loss."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.algorithm.future_kl import SequenceShards
from fipo_megatron.data.packing import MicroBatch, MiniBatch, PackedSequences, pack
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.observe.profiling import span


@dataclass(frozen=True)
class LocalMicroBatch:
    """The part of a packed micro-batch that one context-parallel rank holds, on its device.

    Attributes:
        index: Number of the micro-batch on this data-parallel rank.
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

    index: int
    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    mask: Tensor
    padding: Tensor
    advantages: Tensor
    behaviour_log_probs: Tensor
    packed_seq_params: PackedSeqParams
    shards: SequenceShards


def count_divisor(layout: RankLayout) -> int:
    """Returns the divisor of the number of micro-batches per rank that the pipeline's schedule needs."""
    return layout.pipeline_size if layout.virtual_size > 1 else 1


def count_micro_batches(mini_batch: MiniBatch, layout: RankLayout) -> int:
    """Returns the number of micro-batches per rank.

    Raises:
        ValueError: the plan was made for another layout; on all ranks.
    """
    ranks = len(mini_batch.micro_batches)
    if ranks != layout.data_size:
        raise ValueError(f"plan: made for {ranks} data-parallel ranks, there are {layout.data_size}")
    if (number := len(mini_batch.micro_batches[0])) % count_divisor(layout):
        raise ValueError(
            f"plan: {number} micro-batches per rank; the interleaved schedule needs a multiple of "
            f"{count_divisor(layout)}"
        )
    return number


def local_micro_batches(
    members: Sequence[MicroBatch],
    trajectories: Mapping[int, Trajectory] | Sequence[Trajectory],
    layout: RankLayout,
    *,
    token_multiple: int = 1,
    mask_truncated: bool = False,
    boundaries_on_host: bool = False,
) -> Iterator[LocalMicroBatch]:
    """Yields the micro-batches of this data-parallel rank; each is packed and moved to the device when it is asked for.

    Args:
        members: Indices of the trajectories of each micro-batch; empty for a filler.
        trajectories: Trajectories by index; only those of ``members`` are read.
        layout: Layout of this rank.
        token_multiple: Divisor of the number of tokens per context-parallel rank.
        mask_truncated: Whether truncated responses are left out of the loss (:func:`.data.packing.pack`).
        boundaries_on_host: Whether ``cu_seqlens`` stays on the host, as our attention needs it; Transformer Engine
            reads it on the device.
    """

    def packed(index: int, micro_batch: MicroBatch) -> LocalMicroBatch:
        with span("pack"):
            whole = pack(
                [trajectories[i] for i in micro_batch],
                layout.context,
                multiple_of=token_multiple,
                mask_truncated=mask_truncated,
            )
            return _to_device(index, whole, layout, boundaries_on_host=boundaries_on_host)

    for index, micro_batch in enumerate(members):
        yield packed(index, micro_batch)  # kept by no name here: it is freed with the pass


def each_to_all(micros: Iterator[LocalMicroBatch], readers: int) -> list[Iterator[LocalMicroBatch]]:
    """Returns iterators that each yield all micro-batches; one is kept until the last reader has taken it.

    ``itertools.tee`` keeps blocks of 57 items.
    """
    waiting: list[deque[LocalMicroBatch]] = [deque() for _ in range(readers)]

    def read(mine: deque[LocalMicroBatch]) -> Iterator[LocalMicroBatch]:
        while mine or append_next():
            yield mine.popleft()

    def append_next() -> bool:
        for micro in itertools.islice(micros, 1):
            for each in waiting:
                each.append(micro)
            return True
        return False

    return [read(mine) for mine in waiting]


def _to_device(index: int, whole: PackedSequences, layout: RankLayout, *, boundaries_on_host: bool) -> LocalMicroBatch:
    """Copies this rank's part of a packed micro-batch to the device, without waiting for its kernels."""

    def moved(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    device, part = layout.device, whole.slice(layout.context)
    cu_seqlens = torch.from_numpy(whole.cu_seqlens) if boundaries_on_host else moved(whole.cu_seqlens)
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
    return LocalMicroBatch(
        index=index,
        tokens=moved(part.tokens)[None],
        position_ids=moved(part.position_ids)[None],
        labels=moved(part.labels)[None],
        mask=moved(part.mask),
        padding=moved(part.padding)[None],
        advantages=moved(part.advantages),
        behaviour_log_probs=moved(part.behaviour_log_probs),
        packed_seq_params=packed_seq_params,
        shards=SequenceShards.build(
            layout.context.chunk_lengths(whole.cu_seqlens), layout.context.owners, layout.context.rank, device
        ),
    )
