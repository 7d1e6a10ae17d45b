"""Loads Hugging Face weights into the live shards of any layout, streams them back out, and saves them.

Which slice of which tensor a rank holds follows from :mod:`fipo_megatron.weights.tables`; here it meets Megatron's
parameters and process groups.
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
"""Is told of bytes that are done, on each rank of its own."""


def parameter_placement(chunks: Sequence[HiddenStateGPTModel], layout: RankLayout) -> ParameterPlacement:
    """What this rank holds, read from its chunks, so that any split of layers that Megatron made is the right one."""
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
    """Every parameter of this rank with what the table says of it, in the order of the table.

    Raises:
        RuntimeError: the table does not describe these chunks: names or shapes differ (all are listed).
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
    """Fills this rank's parameters from a model's directory, reading only the slices that it holds.

    Values are cast to the parameters' dtype; padding becomes 0. Not a collective. Call it before the optimizer copies
    the parameters. ``progress`` is told of bytes that are filled.

    Raises:
        WeightsError: files or tensors are missing, unexpected, mis-shaped, corrupt or of a dtype that is not supported:
            all are listed, and no parameter has been touched.
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
    """What one gather brings together: a weight, or the experts that hold the same place on all expert ranks.

    Attributes:
        weights: One, or one for each rank of expert parallelism.
        local: This rank's part.
        parts: Ranks that the weights are spread over; 1: no gather.
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
    """Runs of units of bounded size, unless one alone is larger."""
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
    """Streams every tensor under its Hugging Face name, whole: a collective of the ranks of a pipeline stage.

    Each stage streams its own layers, so that names differ from stage to stage; within a stage all ranks see the same
    buckets and must take all of them, at the same time. Tensors are in the dtype of the parameters, on this rank's
    device, valid until the next bucket is taken and not to be changed: some are the parameters themselves.

    Args:
        chunks: This rank's.
        architecture: Of the model.
        layout: Of this rank.
        bucket_bytes: Bound of the tensors of a bucket, unless one parameter alone is larger.
        on_ranks: Ranks that get the tensors, the same on every rank; None: all. The others get None for each tensor,
            and groups of ranks none of which is named exchange nothing.

    Yields:
        Names and tensors.
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
    """The parts of every unit: one collective for those that are spread alike, where a rank of its group wants them."""
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
    """Ranks in the group of the experts, ordered by expert rank, then expert tensor rank; a collective of the group."""
    if layout.expert_size * layout.expert_tensor_size == 1:
        return None
    group = _group(expert=True)
    found: list[tuple[int, int]] = [(0, 0)] * group.size()
    dist.all_gather_object(found, (layout.expert_rank, layout.expert_tensor_rank), group=group)
    return sorted(range(len(found)), key=found.__getitem__)


def _gather(locals_: list[Tensor], group: dist.ProcessGroup, order: list[int] | None) -> list[list[Tensor]]:
    """For each tensor, its parts on all ranks of the group: one collective."""
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
    """The tensors that a whole parameter is made of: views where one piece is all of a tensor, else copies."""
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
    """Writes a complete Hugging Face directory: a collective of all ranks, which must see one file system.

    The first rank of every pipeline stage writes the stage's tensors as they come. All is written beside the target and
    renamed at the end: where anything fails, on any rank, nothing is left under the final name.

    Args:
        chunks: This rank's.
        architecture: Of the model.
        layout: Of this rank.
        source: A model's directory to take config.json, the tokenizer and the generation configuration from.
        target: Must not exist; its parent must.
        dtype: Of the weights on disk; None: that of the parameters.
        max_file_bytes: Bound of the weights in one file, unless one tensor alone is larger.
        bucket_bytes: See :func:`export_hf`.
        progress: Is told of bytes that this rank has written.
        verify: Called on all ranks with what was written, before it takes its name; raises on all to prevent that.

    Raises:
        FileExistsError: the target exists.
        ValueError: a dtype that is not supported.
        OSError: the disk is full, and the like; on ranks where all went well, RuntimeError says what failed on which.
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
    """Gives a directory that takes the target's name at the end, if nothing fails on any rank. A collective.

    Args:
        source: Must hold a config.json.
        target: Must not exist; its parent must.
        layout: Of this rank; the first makes and renames the directory, all must see it.
        group: See :func:`.collectives.raise_on_all_ranks`.
    """
    partial = partial_of(target)
    with raise_on_all_ranks("beginning to save", group):
        if layout.rank == 0:
            hf_files.check_source(source)
            publishing.begin(target)
    try:
        with raise_on_all_ranks("beginning to save", group):
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
    """The first rank that holds each chunk of the model. A collective of all ranks."""
    runs: list[tuple[Chunk, ...]] = [()] * layout.world_size
    dist.all_gather_object(runs, parameter_placement(chunks, layout).chunks)
    owners: dict[Chunk, int] = {}
    for rank, places in enumerate(runs):
        for chunk in places:
            owners.setdefault(chunk, rank)
    return owners


def _plan(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> list[TensorFile]:
    """The files, in the order of layers, each owned by the first rank of the stage that its tensors are on."""
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
    """Writes what comes, and takes all of it even where writing has failed: the other ranks are in the collectives."""
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
