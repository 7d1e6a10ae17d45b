"""Saves and loads sharded checkpoints in Megatron's ``torch_dist`` format: saved under one layout, loaded under any.

Names and shapes are Megatron-Core's own (``sharded_state_dict``), so that its other users can load them, too; what
should be there is known without it (:mod:`fipo_megatron.weights.torch_dist`).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import BytesCallback, local_parameters, parameter_placement, published_directory
from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.storage import checksums
from fipo_megatron.weights import hf_files, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

CONTENT = {"singleton_local_shards": False, "non_homogeneous_layers": True}
"""How Megatron-Core names tensors: one name per layer, the experts of a layer in one tensor. It stands in the
checkpoint (``load_content_metadata``), where Megatron-LM reads it."""


def sharded_weights(chunks: Sequence[HiddenStateGPTModel]) -> ShardedStateDict:
    """This rank's shards of every tensor, as views of the parameters: loading fills the parameters themselves."""
    metadata = CONTENT | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found: ShardedStateDict = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    apply_factories(found)
    return found


@dataclass(frozen=True)
class Staged:
    """What a rank writes of a checkpoint.

    Attributes:
        tensors: For torch's writer, by the names in the checkpoint.
        common: What is the same on all ranks, pickled.
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
    """Collects what is to be written; with ``live``, as it is now, whatever happens to the model later. A collective.

    Args:
        chunks: This rank's.
        more: Gives what is saved beside the weights: shards of this rank.
        content: How tensors are named and cut.
        live: Tensors beside the parameters that training changes; what is on a device or shares memory with them or
            the parameters is copied to the host. None: nothing is copied.
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
    """What was gathered for the checkpoint is not copied again: it can be as large as all else on the host."""
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
    """Writes a checkpoint: a collective of all ranks, which must see one file system.

    Everything is written beside the target and renamed at the end: where anything fails, on any rank, nothing is left
    under the final name.

    Args:
        staged: This rank's.
        layout: Of this rank.
        source: The Hugging Face directory to copy config.json, tokenizer and so on from.
        target: Must not exist; its parent must.
        write_more: Called on all ranks with the directory before it takes its name, to add files.
        progress: Is told of bytes that this rank has written.
        verify: Called on all ranks with what was written, before it takes its name; raises on all to prevent that.
        group: Of all ranks, on the host, where this runs in a thread; None: the default one.

    Raises:
        FileExistsError: the target exists.
        OSError: the disk is full, and the like; on ranks where all went well, RuntimeError says what failed on which.
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
                save_config(CheckpointingConfig("torch_dist", 1), str(partial))
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
    """Fills this rank's parameters from a checkpoint that any layout saved; see :func:`load`."""
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
    """Fills this rank's parameters from a checkpoint that any layout saved: a collective of all ranks.

    Values are cast to the parameters' dtype; padding becomes 0. What Transformer Engine keeps beside weights and the
    checkpoint lacks stays as it is. Call it before the optimizer copies the parameters.

    Args:
        chunks: This rank's.
        architecture: Of the model.
        layout: Of this rank.
        path: Of the checkpoint.
        more: Gives what else is to be loaded: shards of this rank.
        verified: The files' checksums were compared already.

    Returns:
        What ``more`` gave, filled.

    Raises:
        WeightsError: the checkpoint does not hold this model, or files are missing, truncated or corrupt: everything at
            fault is listed, and no parameter has been touched.
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
            found = dist_checkpointing.load(shards | others, str(path))
        except CheckpointException as error:
            raise WeightsError(f"{path}: corrupt: {_first(error)}") from error
        except (CheckpointingException, pickle.UnpicklingError) as error:
            raise WeightsError(f"{path}: corrupt: {error!r}") from error
        _zero_padding(chunks, architecture, layout)
    return {name: found[name] for name in others}


def _zero_padding(chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout) -> None:
    """Rows of no token, which an equally padded checkpoint may hold anything in."""
    placement = parameter_placement(chunks, layout)
    for local, parameter in local_parameters(chunks, architecture, layout):
        if local.weight.entry.padded:
            pieces = local.weight.pieces(*local.weight.shard(placement), placement.padded_vocab)
            parameter[max((piece.offset + piece.size for piece in pieces), default=0) :].zero_()


def _write_checksums(directory: Path, layout: RankLayout, group: dist.ProcessGroup | None) -> None:
    """Every rank reads the files that it wrote, the first all others, too. A collective."""
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


def verify_checksums(directory: Path, layout: RankLayout, must_have: Sequence[str] = ()) -> None:
    """Every rank reads its share of the files. A collective.

    Args:
        directory: The checkpoint.
        layout: Of this rank.
        must_have: Files whose checksums must be there; those of other programs have none.

    Raises:
        WeightsError: a file is missing or corrupt; on all ranks alike.
    """
    everywhere: list[list[str]] = [[]] * layout.world_size
    mine: list[str] = []
    with raise_on_all_ranks("load_weights"):
        mine = checksums.problems(directory, layout.rank, layout.world_size)
        if not mine and layout.rank == 0:
            known = checksums.read(directory)
            mine = [f"{directory / name}: missing in {checksums.FILE}" for name in must_have if name not in known]
    dist.all_gather_object(everywhere, mine)
    if found := [problem for problems in everywhere for problem in problems]:
        raise WeightsError("\n".join(found))


def _write(tensors: dict[str, Any], directory: Path, progress: BytesCallback, group: dist.ProcessGroup | None) -> None:
    """With torch's own writer, tensor by tensor: Megatron-Core's forks, and every child counts its memory again."""
    try:
        torch_checkpoint.save(
            tensors, storage_writer=_Writer(directory), planner=_Planner(progress), process_group=group
        )
    except CheckpointException as error:
        raise OSError(f"{directory}: {_first(error)}") from error


class _Writer(torch_checkpoint.FileSystemWriter):
    """Where the disk is full, torch complains of a position in the file; this says what the system said."""

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


class _Planner(MCoreSavePlanner):  # type: ignore[misc]
    def __init__(self, progress: BytesCallback) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._progress = progress

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        self._progress(data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes)
        return data


def _first(error: CheckpointException) -> str:
    """The failures of a collective of torch's, one rank's each, without their stacks."""
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
