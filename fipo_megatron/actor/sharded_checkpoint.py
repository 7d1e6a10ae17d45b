"""Saves and loads sharded checkpoints in Megatron's ``torch_dist`` format: saved under one layout, loaded under any.

Names and shapes are Megatron-Core's own (``sharded_state_dict``), so its other users can load them too. The expected
tensors are known without Megatron-Core (:mod:`fipo_megatron.weights.torch_dist`).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner

from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import BytesCallback, local_parameters, parameter_placement, published_directory
from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.storage import checksums
from fipo_megatron.weights import hf_files, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError, first_line

CONTENT = {"singleton_local_shards": False, "non_homogeneous_layers": True}
"""Naming of tensors by Megatron-Core: one name per layer, the experts of a layer in one tensor. Saved in the checkpoint
(``load_content_metadata``), where Megatron-LM reads it."""


def sharded_weights(chunks: Sequence[HiddenStateGPTModel]) -> ShardedStateDict:
    """Returns this rank's shards of every tensor, as views of the parameters, which loading fills in place."""
    metadata = CONTENT | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found: ShardedStateDict = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    apply_factories(found)
    return found


@dataclass(frozen=True)
class Staged:
    """A rank's part of a checkpoint before it is written.

    Attributes:
        tensors: Tensors for torch's writer, by their names in the checkpoint.
        common: Pickled state that is the same on all ranks.
    """

    tensors: dict[str, Any]
    common: bytes


def stage(
    chunks: Sequence[HiddenStateGPTModel],
    *,
    more: Callable[[], ShardedStateDict] = dict,
    content: dict[str, Any] = CONTENT,
    live: Iterable[Tensor] | None = None,
) -> Staged:
    """Collects the state to write. With ``live``, later changes of the model do not affect it. A collective.

    Args:
        chunks: This rank's chunks.
        more: Function that returns this rank's shards to save beside the weights.
        content: Megatron-Core's metadata on names and sharding of tensors.
        live: Tensors, beside the parameters, that training changes. Tensors on a device or sharing memory with these or
            the parameters are copied to the host. None: nothing is copied.
    """
    with raise_on_all_ranks("save_weights"):
        state: ShardedStateDict = sharded_weights(chunks) | more() | {_CONTENT_METADATA_KEY: content}
        apply_factories(state)
        shards, common = save_preprocess(state, validate_access_integrity=False)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        if live is not None:
            _copy([shard for shards in by_key.values() for shard in shards], [*_tensors_of(chunks), *live])
        pickled = io.BytesIO()
        torch.save(common, pickled)
        tensors = mcore_to_pyt_state_dict(by_key)
    return Staged(tensors, pickled.getvalue())


def _tensors_of(chunks: Sequence[HiddenStateGPTModel]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from chunk.parameters()
        yield from chunk.buffers()


def _copy(shards: Iterable[ShardedTensor | ShardedObject], live: Iterable[Tensor]) -> None:
    """Copies shards that training can change. Tensors gathered for the checkpoint, which can be large, are kept."""
    changing = {tensor.untyped_storage().data_ptr() for tensor in live}
    for shard in shards:
        if not isinstance(shard.data, Tensor):
            shard.data = copy.deepcopy(shard.data)
        elif shard.data.device.type != "cpu":
            shard.data = shard.data.detach().cpu()
        elif shard.data.untyped_storage().data_ptr() in changing:
            shard.data = shard.data.detach().clone()


def write(
    staged: Staged,
    layout: RankLayout,
    source: str | Path,
    target: str | Path,
    *,
    write_more: Callable[[Path], None] = lambda partial: None,
    progress: BytesCallback = lambda done: None,
    verify: Callable[[Path], None] = lambda written: None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a checkpoint. A collective of all ranks, which must share a file system.

    Files are written beside the target and renamed at the end. If anything fails on any rank, nothing is left under the
    final name.

    Args:
        staged: This rank's part.
        layout: Layout of this rank.
        source: Hugging Face directory with config.json, tokenizer and so on to copy.
        target: Directory to write. Must not exist; its parent must.
        write_more: Function called on all ranks with the directory to add files before it is renamed.
        progress: Callback for the bytes that this rank has written.
        verify: Function called on all ranks with the directory before it is renamed; it prevents that by raising on
            all ranks.
        group: Process group of all ranks on the host, required in a thread; None: the default group.

    Raises:
        FileExistsError: the target exists.
        OSError: writing failed, for example because the disk is full.
        RuntimeError: another rank failed; the message says which and why.
    """
    source, target = Path(source), Path(target)
    with published_directory(source, target, layout, group) as partial:
        with raise_on_all_ranks("save_weights", group):
            if layout.rank == 0:
                (partial / torch_dist.COMMON).write_bytes(staged.common)
        with raise_on_all_ranks("save_weights", group):
            _write(staged.tensors, partial, progress, group)
        with raise_on_all_ranks("save_weights", group):
            if layout.rank == 0:
                torch_dist.write_backend(partial)
                torch_dist.check_files(partial)
                (partial / torch_dist.HUGGING_FACE).mkdir()
                hf_files.add_companions(source, partial / torch_dist.HUGGING_FACE)
        with raise_on_all_ranks("save_weights", group):
            write_more(partial)
        _write_checksums(partial, layout, group)
        verify(partial)


def save_weights(
    chunks: Sequence[HiddenStateGPTModel],
    layout: RankLayout,
    source: str | Path,
    target: str | Path,
    *,
    progress: BytesCallback = lambda done: None,
    verify: Callable[[Path], None] = lambda written: None,
) -> None:
    """Writes a checkpoint of the weights alone; see :func:`write`."""
    write(stage(chunks), layout, source, target, progress=progress, verify=verify)


def load_weights(
    chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout, path: str | Path
) -> None:
    """Loads this rank's parameters from a checkpoint of any layout; see :func:`load`."""
    load(chunks, architecture, layout, path)


@torch.no_grad()
def load(
    chunks: Sequence[HiddenStateGPTModel],
    architecture: Architecture,
    layout: RankLayout,
    path: str | Path,
    *,
    more: Callable[[], ShardedStateDict] = dict,
    verified: bool = False,
) -> ShardedStateDict:
    """Loads this rank's parameters from a checkpoint of any layout. A collective of all ranks.

    Values are cast to the parameters' dtype; padding is set to 0. Transformer Engine's extra state, which the
    checkpoint lacks, stays unchanged. Call it before the optimizer copies the parameters.

    Args:
        chunks: This rank's chunks.
        architecture: Architecture of the model.
        layout: Layout of this rank.
        path: Directory of the checkpoint.
        more: Function that returns this rank's other shards to load.
        verified: Whether the files' checksums were compared already.

    Returns:
        The filled shards of ``more``.

    Raises:
        WeightsError: the checkpoint does not hold this model, or files are missing, truncated or corrupt. All problems
            are listed, and no parameter has been changed.
    """
    path = Path(path)
    with raise_on_all_ranks("load_weights"):
        torch_dist.check(path, architecture)
    if not verified:
        verify_checksums(path, layout)
    with raise_on_all_ranks("load_weights"):
        shards = {
            index: {name: shard for name, shard in shards.items() if not isinstance(shard, ShardedObject)}
            for index, shards in sharded_weights(chunks).items()
        }
        others = more()
    found: ShardedStateDict = {}
    with raise_on_all_ranks("load_weights"):
        try:
            with _plain_objects():
                found = dist_checkpointing.load(shards | others, str(path))
        except CheckpointException as error:
            raise WeightsError(f"{path}: corrupt: {_first(error)}") from error
        except (CheckpointingException, pickle.UnpicklingError, KeyError) as error:
            raise WeightsError(f"{path}: corrupt: {first_line(error)}") from error
        _zero_padding(chunks, architecture, layout)
    return {name: found[name] for name in others}


class _LoadPlanner(torch_strategy.MCoreLoadPlanner):  # type: ignore[misc]  # Megatron-Core has no type information
    """Planner that loads the objects of a checkpoint, beside its tensors, without running code of theirs."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Loads an object with torch's unpickler that knows only tensors and plain data; torch's planner runs any code.

        Raises:
            UnpicklingError: The object holds something else.
        """
        plain = io.BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except Exception as error:  # a damaged archive raises errors of any type
            raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is refused: {first_line(error)}") from None
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextmanager
def _plain_objects() -> Iterator[None]:
    """Lets Megatron-Core use :class:`_LoadPlanner`; its loader names its planner itself."""
    original = torch_strategy.MCoreLoadPlanner
    torch_strategy.MCoreLoadPlanner = _LoadPlanner
    try:
        yield
    finally:
        torch_strategy.MCoreLoadPlanner = original


def _zero_padding(chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout) -> None:
    """Zeroes the rows of padding, which an equally padded checkpoint may have filled with anything."""
    placement = parameter_placement(chunks, layout)
    for local, parameter in local_parameters(chunks, architecture, layout):
        if local.weight.entry.padded:
            pieces = local.weight.pieces(*local.weight.shard(placement), placement.padded_vocab)
            parameter[max((piece.offset + piece.size for piece in pieces), default=0) :].zero_()


def _write_checksums(directory: Path, layout: RankLayout, group: dist.ProcessGroup | None) -> None:
    """Writes all checksums. Each rank reads the files that it wrote, rank 0 also those of no rank. A collective."""
    everywhere: list[dict[str, str]] = [{}] * layout.world_size
    mine: dict[str, str] = {}
    with raise_on_all_ranks("save_weights", group):
        files = [path for path in directory.rglob("*") if path.is_file()]
        own = [path for path in files if path.match(f"__{layout.rank}_*.distcp")]
        own += [path for path in files if path.suffix != ".distcp"] if layout.rank == 0 else []
        mine = checksums.compute(directory, [str(path.relative_to(directory)) for path in own])
    dist.all_gather_object(everywhere, mine, group=group)
    with raise_on_all_ranks("save_weights", group):
        if layout.rank == 0:
            checksums.write(directory, {name: sum_ for found in everywhere for name, sum_ in found.items()})


def verify_checksums(directory: Path, layout: RankLayout) -> None:
    """Compares the checksums of all files; each rank reads a part of them. A collective.

    Args:
        directory: Directory of the checkpoint.
        layout: Layout of this rank.

    Raises:
        WeightsError: a file is missing or corrupt; on all ranks.
    """
    everywhere: list[list[str]] = [[]] * layout.world_size
    mine: list[str] = []
    with raise_on_all_ranks("load_weights"):
        mine = checksums.problems(directory, layout.rank, layout.world_size)
    dist.all_gather_object(everywhere, mine)
    if found := [problem for problems in everywhere for problem in problems]:
        raise WeightsError("\n".join(found))


def _write(tensors: dict[str, Any], directory: Path, progress: BytesCallback, group: dist.ProcessGroup | None) -> None:
    """Writes tensor by tensor with torch's writer; Megatron-Core's forks, and every child counts its memory again."""
    try:
        torch_checkpoint.save(
            tensors, storage_writer=_Writer(directory), planner=_Planner(progress), process_group=group
        )
    except CheckpointException as error:
        raise OSError(f"{directory}: {_first(error)}") from error


class _Writer(torch_checkpoint.FileSystemWriter):
    """Writer that raises the system's error if the disk is full, where torch reports a position in the file."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from error


class _Planner(MCoreSavePlanner):  # type: ignore[misc]  # Megatron has no types
    def __init__(self, progress: BytesCallback) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._progress = progress

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        self._progress(data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes)
        return data


def _first(error: CheckpointException) -> str:
    """Returns the failures of torch's collective, one per rank, without stack traces."""
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
