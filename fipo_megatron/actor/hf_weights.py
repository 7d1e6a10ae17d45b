"""Loads Hugging Face weights into the live shards of any layout, streams them back out, and saves them.

Which slice of which tensor a rank holds follows from :mod:`fipo_megatron.weights.tables`. This module applies it to
Megatron's parameters and process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.storage import publishing
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.weights import hf_files, tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import DTYPES, HfDirectory
from fipo_megatron.weights.hf_files import TensorFile
from fipo_megatron.weights.placement import Chunk, Naming, ParameterPlacement
from fipo_megatron.weights.tables import LocalWeight, Weight

Bucket = list[tuple[str, Tensor | None]]
BytesCallback = Callable[[int], None]
"""Callback for the bytes that this rank has done."""


def parameter_placement(chunks: Sequence[HiddenStateGPTModel], layout: RankLayout) -> ParameterPlacement:
    """Returns what this rank holds, read from its chunks, so that any split of layers by Megatron is valid."""
    runs = []
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        run = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
        runs.append(Chunk(run, bool(chunk.pre_process), bool(chunk.post_process)))
    return ParameterPlacement(
        tuple(runs),
        chunks[0].vocab_size,
        layout.tensor_rank,
        layout.tensor_size,
        layout.expert_rank,
        layout.expert_size,
        layout.expert_tensor_rank,
        layout.expert_tensor_size,
    )


def local_parameters(
    chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout
) -> Iterator[tuple[LocalWeight, Tensor]]:
    """Yields every parameter of this rank with its entry in the table, in the order of the table.

    Raises:
        RuntimeError: the table does not describe these chunks; all differences of names and shapes are listed.
    """
    found = [dict(chunk.named_parameters()) for chunk in chunks]
    naming = Naming.from_parameter_names([name for parameters in found for name in parameters])
    expected = list(tables.local_weights(architecture, parameter_placement(chunks, layout), naming))
    wanted = {(local.chunk, local.name): local for local in expected}
    present = {(index, name): p for index, parameters in enumerate(found) for name, p in parameters.items()}
    problems = [f"chunk {i}: {name}: in the table only" for i, name in wanted.keys() - present.keys()]
    problems += [f"chunk {i}: {name}: in the model only" for i, name in present.keys() - wanted.keys()]
    problems += [
        f"chunk {key[0]}: {key[1]}: shape {list(present[key].shape)}, by the table {list(wanted[key].shape)}"
        for key in wanted.keys() & present.keys()
        if tuple(present[key].shape) != wanted[key].shape
    ]
    if problems:
        raise RuntimeError(f"the table of {architecture.name} does not fit the model:\n" + "\n".join(sorted(problems)))
    for local in expected:
        yield local, present[local.chunk, local.name].detach()


@torch.no_grad()
def load_hf(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    path: str | Path,
    *,
    progress: BytesCallback = lambda done: None,
) -> None:
    """Loads this rank's parameters from a Hugging Face directory, reading only the slices that it holds.

    Values are cast to the parameters' dtype; padding is set to 0. Not a collective. Call it before the optimizer copies
    the parameters.

    Args:
        chunks: This rank's chunks.
        architecture: Architecture of the model.
        layout: Layout of this rank.
        path: Hugging Face directory of the model.
        progress: Callback for the bytes loaded.

    Raises:
        WeightsError: files or tensors are missing, unexpected, mis-shaped, corrupt or of an unsupported dtype. All are
            listed, and no parameter has been changed.
    """
    directory = HfDirectory(path)
    directory.check(architecture)
    padded_vocab, placement = chunks[0].vocab_size, parameter_placement(chunks, layout)
    for local, parameter in list(local_parameters(chunks, architecture, layout)):
        if local.weight.entry.padded:
            parameter.zero_()
        for piece in local.weight.pieces(*local.weight.shard(placement), padded_vocab):
            parameter.narrow(piece.axis, piece.offset, piece.size).copy_(directory.read(piece))
        progress(parameter.nbytes)


@dataclass(frozen=True)
class _GatherUnit:
    """The weights that one gather assembles: one weight, or the experts at the same index of all expert ranks.

    Attributes:
        weights: One weight, or one per expert-parallel rank.
        local: This rank's shard.
        parts: Number of ranks that hold shards; 1: no gather.
    """

    weights: tuple[Weight, ...]
    local: Tensor
    parts: int

    @property
    def expert(self) -> bool:
        return self.weights[0].expert is not None

    @property
    def bytes(self) -> int:
        return sum(weight.elements for weight in self.weights) * self.local.element_size()


def _units(
    chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout
) -> Iterator[_GatherUnit]:
    placement = parameter_placement(chunks, layout)
    per_rank = len(tables.local_experts(architecture, placement))
    for local, parameter in local_parameters(chunks, architecture, layout):
        weight, (_, size) = local.weight, local.weight.shard(placement)
        if weight.copy:
            continue
        if weight.expert is None:
            yield _GatherUnit((weight,), parameter, size)
        else:
            slot = weight.expert % per_rank
            experts = range(slot, per_rank * layout.expert_size, per_rank)
            everywhere = tuple(tables.expert_weight(architecture, weight, expert) for expert in experts)
            yield _GatherUnit(everywhere, parameter, size * layout.expert_size)


def _buckets(units: Iterator[_GatherUnit], bucket_bytes: int) -> Iterator[list[_GatherUnit]]:
    """Yields consecutive units of bounded total size, unless a single one is larger."""
    bucket: list[_GatherUnit] = []
    filled = 0
    for unit in units:
        if bucket and filled + unit.bytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(unit)
        filled += unit.bytes
    if bucket:
        yield bucket


@torch.no_grad()
def export_hf(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    *,
    bucket_bytes: int = 256 << 20,
    on_ranks: Collection[int] | None = None,
) -> Iterator[Bucket]:
    """Streams all tensors, whole, under their Hugging Face names. A collective of the ranks of a pipeline stage.

    Each stage streams its own layers, so names differ between stages. Within a stage all ranks get the same buckets and
    must consume all of them, at the same time. Tensors have the dtype of the parameters and are on this rank's device.
    They are valid until the next bucket and must not be changed: some are the parameters themselves.

    Args:
        chunks: This rank's chunks.
        architecture: Architecture of the model.
        layout: Layout of this rank.
        bucket_bytes: Maximum bytes of the tensors of a bucket, unless a single parameter is larger.
        on_ranks: Ranks that receive the tensors, the same set on every rank; None: all. Other ranks receive None for
            each tensor, and process groups without a receiving rank communicate nothing.

    Yields:
        Names and tensors of a bucket.
    """
    padded_vocab, order = chunks[0].vocab_size, _expert_order(layout)
    for bucket in _buckets(_units(chunks, architecture, layout), bucket_bytes):
        parts = _gather_bucket(bucket, order, on_ranks)
        if on_ranks is not None and layout.rank not in on_ranks:
            yield [(name, None) for unit in bucket for weight in unit.weights for name, _ in weight.tensors]
            continue
        yield [
            named
            for unit, gathered in zip(bucket, parts, strict=True)
            for weight, own in _by_weight(unit, gathered)
            for named in _tensors(weight, own, padded_vocab)
        ]


def _gather_bucket(
    bucket: list[_GatherUnit], order: list[int] | None, on_ranks: Collection[int] | None
) -> list[list[Tensor]]:
    """Gathers the shards of every unit: one collective per dtype and sharding, if a rank of its group receives them."""
    kinds: dict[tuple[torch.dtype, bool, int], list[int]] = {}
    for index, unit in enumerate(bucket):
        kinds.setdefault((unit.local.dtype, unit.expert, unit.parts), []).append(index)
    parts: list[list[Tensor]] = [[unit.local] for unit in bucket]
    for (_, expert, size), members in kinds.items():
        if size == 1:
            continue
        group = _group(expert)
        if on_ranks is not None and {*dist.get_process_group_ranks(group)}.isdisjoint(on_ranks):
            continue
        gathered = _gather([bucket[index].local for index in members], group, order if expert else None)
        for index, found in zip(members, gathered, strict=True):
            parts[index] = found
    return parts


def _group(expert: bool) -> dist.ProcessGroup:
    found: dist.ProcessGroup = (
        parallel_state.get_expert_tensor_and_model_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    return found


def _expert_order(layout: RankLayout) -> list[int] | None:
    """Returns the experts' group ordered by expert rank, then expert tensor rank. A collective of the group."""
    if layout.expert_size * layout.expert_tensor_size == 1:
        return None
    group = _group(expert=True)
    found: list[tuple[int, int]] = [(0, 0)] * group.size()
    dist.all_gather_object(found, (layout.expert_rank, layout.expert_tensor_rank), group=group)
    return sorted(range(len(found)), key=found.__getitem__)


def _gather(locals_: list[Tensor], group: dist.ProcessGroup, order: list[int] | None) -> list[list[Tensor]]:
    """Gathers for each tensor its shards on all ranks of the group, with one collective."""
    flat = locals_[0].reshape(-1) if len(locals_) == 1 else torch.cat([local.reshape(-1) for local in locals_])
    everything = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(everything, flat.contiguous(), group=group)
    ranks = [torch.split(rank, [local.numel() for local in locals_]) for rank in everything.chunk(group.size())]
    ranks = [ranks[index] for index in order] if order else ranks
    return [[rank[i].view(local.shape) for rank in ranks] for i, local in enumerate(locals_)]


def _by_weight(unit: _GatherUnit, gathered: list[Tensor]) -> Iterator[tuple[Weight, list[Tensor]]]:
    each = len(gathered) // len(unit.weights)
    for index, weight in enumerate(unit.weights):
        yield weight, gathered[index * each : (index + 1) * each]


def _tensors(weight: Weight, parts: list[Tensor], padded_vocab: int) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a whole parameter: views if one piece is the whole tensor, else copies."""
    sources = [
        (piece, parts[part].narrow(piece.axis, piece.offset, piece.size))
        for part in range(len(parts))
        for piece in weight.pieces(part, len(parts), padded_vocab)
    ]
    for name, shape in weight.tensors:
        own = [(piece, source) for piece, source in sources if piece.tensor == name]
        if len(own) == 1:
            yield name, own[0][1]
            continue
        whole = parts[0].new_empty(shape)
        for piece, source in own:
            whole.narrow(piece.axis, piece.start, piece.size).copy_(source)
        yield name, whole


def save_hf(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 << 30,
    bucket_bytes: int = 256 << 20,
    progress: BytesCallback = lambda done: None,
    verify: Callable[[Path], None] = lambda written: None,
) -> None:
    """Writes a complete Hugging Face directory. A collective of all ranks, which must share a file system.

    The first rank of every pipeline stage writes the stage's tensors as they are streamed. Files are written beside the
    target and renamed at the end. If anything fails on any rank, nothing is left under the final name.

    Args:
        chunks: This rank's chunks.
        architecture: Architecture of the model.
        layout: Layout of this rank.
        source: Hugging Face directory with config.json, tokenizer and generation configuration to copy.
        target: Directory to write. Must not exist; its parent must.
        dtype: Dtype of the weights on disk; None: that of the parameters.
        max_file_bytes: Maximum bytes of the weights in one file, unless a single tensor is larger.
        bucket_bytes: Maximum bytes of a bucket (:func:`export_hf`).
        progress: Callback for the bytes that this rank has written.
        verify: Function called on all ranks with the directory before it is renamed; it prevents that by raising on
            all ranks.

    Raises:
        FileExistsError: the target exists.
        ValueError: the dtype is not supported.
        OSError: writing failed, for example because the disk is full.
        RuntimeError: another rank failed; the message says which and why.
    """
    source, target = Path(source), Path(target)
    dtype = dtype or next(chunks[0].parameters()).dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, DTYPES.values()))}")
    with published_directory(source, target, layout) as partial:
        files = _plan(chunks, architecture, layout, dtype, max_file_bytes)
        with raise_on_all_ranks("save_hf"):
            mine = [file for file in files if file.owner == layout.rank]
            stream = export_hf(
                chunks, architecture, layout, bucket_bytes=bucket_bytes, on_ranks={file.owner for file in files}
            )
            _write(stream, partial, mine, dtype, progress)
        with raise_on_all_ranks("save_hf"):
            if layout.rank == 0:
                hf_files.add_companions(source, partial, dtype)
                hf_files.add_index(partial, files)
        verify(partial)


@contextmanager
def published_directory(
    source: Path, target: Path, layout: RankLayout, group: dist.ProcessGroup | None = None
) -> Iterator[Path]:
    """Yields a new directory that is renamed to the target at the end if no rank failed. A collective.

    Args:
        source: Hugging Face directory; must have a config.json.
        target: Final path. Must not exist; its parent must.
        layout: Layout of this rank. Rank 0 creates and renames the directory; all ranks must see it.
        group: Process group of all ranks (:func:`.collectives.raise_on_all_ranks`).
    """
    partial = partial_of(target)
    with raise_on_all_ranks("preparing the directory", group):
        if layout.rank == 0:
            hf_files.check_source(source)
            publishing.begin(target)
    try:
        with raise_on_all_ranks("preparing the directory", group):
            if not partial.is_dir():
                raise FileNotFoundError(
                    f"{partial}: not seen by rank {layout.rank}; all ranks must share a file system"
                )
        yield partial
        with raise_on_all_ranks("publishing", group):
            if layout.rank == 0:
                publishing.publish(target)
    finally:
        if layout.rank == 0:
            publishing.discard(target)


def chunk_owners(chunks: Sequence[HiddenStateGPTModel], layout: RankLayout) -> dict[Chunk, int]:
    """Returns the first rank that holds each chunk of the model. A collective of all ranks."""
    runs: list[tuple[Chunk, ...]] = [()] * layout.world_size
    dist.all_gather_object(runs, parameter_placement(chunks, layout).chunks)
    owners: dict[Chunk, int] = {}
    for rank, held in enumerate(runs):
        for chunk in held:
            owners.setdefault(chunk, rank)
    return owners


def _plan(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> list[TensorFile]:
    """Returns the files in the order of layers, each owned by the first rank of the stage that holds its tensors."""
    owners = chunk_owners(chunks, layout)
    experts = range(architecture.mixture.experts if architecture.mixture else 0)
    tensors = [
        (name, shape, owners[chunk])
        for chunk in sorted(owners, key=lambda chunk: (not chunk.first, chunk.last, chunk.layers.start))
        for weight in tables.chunk_weights(architecture, chunk, experts)
        if not weight.copy
        for name, shape in weight.tensors
    ]
    return hf_files.plan_files(tensors, dtype, max_file_bytes)


def _write(
    stream: Iterator[Bucket], directory: Path, files: list[TensorFile], dtype: torch.dtype, progress: BytesCallback
) -> None:
    """Writes the stream and consumes it even if writing fails: the other ranks are in the collectives."""
    try:
        with hf_files.TensorWriter(directory, files, dtype) as writer:
            for bucket in stream:
                for name, tensor in bucket:
                    if files and tensor is not None:
                        writer.write(name, tensor)
                        progress(tensor.numel() * dtype.itemsize)
            writer.finish()
    finally:
        for _ in stream:
            pass
