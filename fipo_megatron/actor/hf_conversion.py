"""Converts whole models between Hugging Face directories and ``torch_dist`` checkpoints, on all ranks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fipo_megatron.actor import parallel
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import BytesCallback, chunk_owners, export_hf, load_hf, save_hf
from fipo_megatron.actor.model import HiddenStateGPTModel, build_model
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.sharded_checkpoint import load_weights, save_weights
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.storage import publishing
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.weights import tables, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import HfDirectory, VerificationError

logger = logging.getLogger(__name__)

Phase = Callable[[str, int], AbstractContextManager[BytesCallback]]
"""Callback at the begin of a phase: takes its name and its bytes on rank 0, returns the callback for bytes done."""


def _silent(what: str, total: int) -> AbstractContextManager[BytesCallback]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Options:
    """Options of a conversion.

    Attributes:
        parallel: Layout of the model during the conversion; the result does not depend on it.
        dtype: Dtype of the result; None: one that represents the source exactly.
        verify: Whether the result is read again and compared, bit for bit.
        phase: Progress callback (:data:`Phase`), called on rank 0 only.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: str | None = None
    verify: bool = False
    phase: Phase = _silent


@dataclass(frozen=True)
class _Model:
    architecture: Architecture
    layout: RankLayout
    chunks: list[HiddenStateGPTModel]

    @property
    def bytes(self) -> int:
        """Size of this rank's parameters in bytes."""
        return sum(parameter.nbytes for chunk in self.chunks for parameter in chunk.parameters())


def hf_to_megatron(source: Path, target: Path, options: Options) -> None:
    """Writes a checkpoint of the weights that every layout can load, with Transformer Engine's layers or without.

    Args:
        source: Hugging Face directory of the model.
        target: Directory to write. Must not exist; its parent must.
        options: Options; ``dtype`` must be float32 or bfloat16.

    Raises:
        WeightsError: the model's files do not match its config.json.
        ValueError: the model cannot be sharded over these ranks.
        FileExistsError: the target exists.
        OSError: writing failed, for example because the disk is full.
        VerificationError: ``Options.verify`` found differences; what was written is removed.
    """
    architecture = Architecture.from_directory(source)
    directory = HfDirectory(source)
    directory.check(architecture)
    directory.check_tied(architecture)
    publishing.refuse_existing(target)
    with _built_model(architecture, options, options.dtype or directory.training_dtype) as model:
        with _phase(options, model, "reading", model.bytes) as progress:
            load_hf(model.chunks, architecture, model.layout, source, progress=progress)

        def verify(written: Path) -> None:
            with _raise_verification_error(written):
                _fill_with_nan(model.chunks)
                load_weights(model.chunks, architecture, model.layout, written)
                _compare(model, options, source, lambda mine, files: (mine, files.to(mine.dtype)))

        with _phase(options, model, "writing", model.bytes) as progress:
            save_weights(
                model.chunks,
                model.layout,
                source,
                target,
                progress=progress,
                verify=verify if options.verify else _unverified,
            )


def megatron_to_hf(source: Path, target: Path, options: Options, hf: Path | None = None) -> None:
    """Writes a complete Hugging Face directory from a checkpoint that any layout has written.

    Args:
        source: Directory of the checkpoint.
        target: Directory to write. Must not exist; its parent must.
        options: Options; ``dtype`` must be float32, bfloat16 or float16.
        hf: Hugging Face directory with config.json, tokenizer and so on; None: those in the checkpoint.

    Raises:
        WeightsError: the checkpoint does not match the config.json.
        ValueError, FileExistsError, OSError, VerificationError: see :func:`hf_to_megatron`.
    """
    hf = torch_dist.companion_directory(source, hf)
    architecture = Architecture.from_directory(hf)
    held = torch_dist.check(source, architecture, hf)
    publishing.refuse_existing(target)
    dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else held
    with _built_model(architecture, options, str(held).removeprefix("torch.")) as model:
        _fill_with_nan(model.chunks)
        load_weights(model.chunks, architecture, model.layout, source)

        def verify(written: Path) -> None:
            with _raise_verification_error(written):
                with raise_on_all_ranks("reading the result again"):
                    HfDirectory(written).check(architecture)
                _compare(model, options, written, lambda mine, files: (mine.to(dtype), files))

        with _phase(options, model, "writing", written_bytes(model, dtype)) as progress:
            save_hf(
                model.chunks,
                architecture,
                model.layout,
                hf,
                target,
                dtype=dtype,
                progress=progress,
                verify=verify if options.verify else _unverified,
            )


@contextmanager
def temporary_hf(checkpoint: Path, target: Path, hf: Path | None = None) -> Iterator[Path]:
    """Converts a checkpoint to a Hugging Face directory that is removed at the end of the block.

    Args:
        checkpoint: Directory of the checkpoint.
        target: Directory to write. What a killed process has left there is removed.
        hf: Hugging Face directory with config.json and so on; see :func:`megatron_to_hf`.

    Raises:
        WeightsError: The checkpoint is damaged or does not fit; see :func:`megatron_to_hf`.
        OSError: The converted model cannot be written.
    """
    for leftover in (target, partial_of(target)):
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s to %s, which is removed at the end", checkpoint, target)
    try:
        megatron_to_hf(checkpoint, target, Options(), hf)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _unverified(written: Path) -> None:
    pass


@contextmanager
def _raise_verification_error(written: Path) -> Iterator[None]:
    """Raises VerificationError on all ranks for any error of the block, which prevents publishing. A collective."""
    try:
        with raise_on_all_ranks("reading the result again"):
            yield
    except Exception as error:
        raise VerificationError(f"the result differs from the source and was removed:\n{error}") from error


def written_bytes(model: _Model, dtype: torch.dtype) -> int:
    """Returns the bytes of the tensors that rank 0 writes to Hugging Face files."""
    own_chunks = {chunk for chunk, rank in chunk_owners(model.chunks, model.layout).items() if rank == 0}
    experts = range(model.architecture.mixture.experts if model.architecture.mixture else 0)
    weights = (w for chunk in own_chunks for w in tables.chunk_weights(model.architecture, chunk, experts))
    return sum(weight.elements for weight in weights if not weight.copy) * dtype.itemsize


@contextmanager
def _built_model(architecture: Architecture, options: Options, dtype: str) -> Iterator[_Model]:
    """Builds the model with uninitialised parameters; destroys the process groups at the end of the block."""
    actor = ActorConfig(
        dtype=dtype,  # type: ignore[arg-type]  # one of the literals, from the command line or the files
        parallel=options.parallel,
        transformer={"perform_initialization": False},
    )
    layout = parallel.initialize(options.parallel, seed=0)
    try:
        yield _Model(architecture, layout, build_model(architecture, actor, layout))
    finally:
        parallel.destroy()


def _phase(options: Options, model: _Model, what: str, total: int) -> AbstractContextManager[BytesCallback]:
    return options.phase(what, total) if model.layout.rank == 0 else _silent(what, total)


@torch.no_grad()
def _fill_with_nan(chunks: Sequence[HiddenStateGPTModel]) -> None:
    """Fills all parameters with NaN, so that a tensor that is not read again differs."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)


def _compare(
    model: _Model, options: Options, path: Path, alike: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Compares every tensor with a Hugging Face directory's, bit for bit. A collective of all ranks.

    Consumes the whole stream even if reading failed: the other ranks of the stage are in its collectives.

    Args:
        model: Model whose weights are compared.
        options: Options of the conversion.
        path: Hugging Face directory.
        alike: Function that casts a tensor of the model and that of the directory to one dtype.
    """
    owners = {*chunk_owners(model.chunks, model.layout).values()}
    total = written_bytes(model, next(model.chunks[0].parameters()).dtype)
    different: list[str] = []
    failed: Exception | None = None
    with _phase(options, model, "verifying", total) as progress:
        directory = HfDirectory(path)
        for bucket in export_hf(model.chunks, model.architecture, model.layout, on_ranks=owners):
            for name, tensor in bucket:
                if tensor is None or failed is not None:
                    continue
                try:
                    mine, files = alike(tensor.cpu(), directory.read_whole(name))
                    if not torch.equal(_bits(mine), _bits(files)):
                        different.append(name)
                except Exception as error:
                    failed = error
                progress(tensor.nbytes)
    if failed is not None:
        raise failed
    if different:
        raise VerificationError(f"{len(different)} tensors differ from {path}:\n" + "\n".join(sorted(different)))


def _bits(tensor: Tensor) -> Tensor:
    """Returns the bits as integers, so that NaN equals itself and −0 differs from 0."""
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)
