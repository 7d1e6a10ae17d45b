"""Saves and loads sharded checkpoints in Megatron's ``torch_dist`` format: saved under one layout, loaded under any.

Names and shapes are Megatron-Core's own (``sharded_state_dict``), so that its other users can load them, too; what
should be there is known without it (:mod:`fipo_megatron.weights.torch_dist`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from fipo_megatron.weights import checksums, hf_files, publish, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

from .agreement import all_or_none
from .hf_weights import Progress
from .model import HiddenStateGPTModel
from .parallel import RankLayout

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


def save_weights(
    chunks: Sequence[HiddenStateGPTModel],
    layout: RankLayout,
    source: str | Path,
    target: str | Path,
    *,
    progress: Progress = lambda done: None,
) -> None:
    """Writes a checkpoint of the weights alone: a collective of all ranks, which must see one file system.

    Everything is written beside the target and renamed at the end: where anything fails, on any rank, nothing is left
    under the final name.

    Args:
        chunks: This rank's.
        layout: Of this rank.
        source: The Hugging Face directory to copy config.json, tokenizer and so on from.
        target: Must not exist; its parent must.
        progress: Is told of bytes that this rank has written.

    Raises:
        FileExistsError: the target exists.
        OSError: the disk is full, and the like; on ranks where all went well, RuntimeError says what failed on which.
    """
    source, target = Path(source), Path(target)
    partial = publish.partial_of(target)
    try:
        with all_or_none("save_weights"):
            if layout.rank == 0:
                hf_files.check_source(source)
                publish.begin(target)
        with all_or_none("save_weights"):
            shards = sharded_weights(chunks)
            dist_checkpointing.save(shards, str(partial), _InProcess(progress), content_metadata=CONTENT)
        with all_or_none("save_weights"):
            _write_checksums(partial, layout)
        with all_or_none("save_weights"):
            if layout.rank == 0:
                (partial / torch_dist.HUGGING_FACE).mkdir()
                hf_files.add_companions(source, partial / torch_dist.HUGGING_FACE)
                publish.publish(target)
    finally:
        if layout.rank == 0:
            publish.discard(target)


@torch.no_grad()
def load_weights(
    chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout, path: str | Path
) -> None:
    """Fills this rank's parameters from a checkpoint that any layout saved: a collective of all ranks.

    Values are cast to the parameters' dtype; padding becomes 0. What Transformer Engine keeps beside weights and the
    checkpoint lacks stays as it is. Call it before the optimizer copies the parameters.

    Raises:
        WeightsError: the checkpoint does not hold this model, or files are missing, truncated or corrupt: everything at
            fault is listed, and no parameter has been touched.
    """
    path = Path(path)
    with all_or_none("load_weights"):
        torch_dist.check(path, architecture)
    _verify_checksums(path, layout)
    shards = {
        index: {name: shard for name, shard in shards.items() if not isinstance(shard, ShardedObject)}
        for index, shards in sharded_weights(chunks).items()
    }
    with all_or_none("load_weights"):
        try:
            dist_checkpointing.load(shards, str(path))
        except CheckpointException as error:
            raise WeightsError(f"{path}: corrupt: {_first(error)}") from error


def _write_checksums(directory: Path, layout: RankLayout) -> None:
    """Every rank reads the files that it wrote, the first those of all. A collective."""
    mine = [path.name for path in directory.glob(f"__{layout.rank}_*")]
    mine += [torch_dist.METADATA, torch_dist.COMMON] if layout.rank == 0 else []
    everywhere: list[dict[str, str]] = [{}] * layout.world_size
    dist.all_gather_object(everywhere, checksums.compute(directory, mine))
    if layout.rank == 0:
        checksums.write(directory, {name: sum_ for found in everywhere for name, sum_ in found.items()})


def _verify_checksums(directory: Path, layout: RankLayout) -> None:
    """Every rank reads its share of the files; all raise WeightsError where any is corrupt. A collective."""
    everywhere: list[list[str]] = [[]] * layout.world_size
    dist.all_gather_object(everywhere, checksums.problems(directory, layout.rank, layout.world_size))
    if found := [problem for problems in everywhere for problem in problems]:
        raise WeightsError("\n".join(found))


class _InProcess(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes with torch's own writer, tensor by tensor: Megatron-Core's forks, and every child counts its memory again.

    Args:
        progress: Is told of bytes that are written.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__("torch_dist", 1)
        self._progress = progress

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        try:
            torch_checkpoint.save(
                mcore_to_pyt_state_dict(by_key),
                storage_writer=_Writer(checkpoint_dir),
                planner=_Planner(self._progress),
            )
        except CheckpointException as error:
            raise OSError(f"{checkpoint_dir}: {_first(error)}") from error


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
    def __init__(self, progress: Progress) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._progress = progress

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        self._progress(data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes)
        return data


def _first(error: CheckpointException) -> str:
    """The failures of a collective of torch's, one rank's each, without their stacks."""
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())
