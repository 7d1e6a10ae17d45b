"""Converts whole models, Hugging Face directory to ``torch_dist`` checkpoint and back: calls that all ranks make."""

from __future__ import annotations

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
from fipo_megatron.weights import tables, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import HfDirectory, VerificationError

Phase = Callable[[str, int], AbstractContextManager[BytesCallback]]
"""Is told what begins, and how many bytes it will take on the first rank; gives what is told of bytes that are done."""


def _silent(what: str, total: int) -> AbstractContextManager[BytesCallback]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        parallel: How the model is spread while it is converted; the result does not depend on it.
        dtype: Of the result; None: one that holds what is there exactly.
        verify: Read the result again and compare it, bit for bit.
        phase: See :data:`Phase`; called on rank 0 only.
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
        """Of the parameters of this rank."""
        return sum(parameter.nbytes for chunk in self.chunks for parameter in chunk.parameters())


def hf_to_megatron(source: Path, target: Path, options: Options) -> None:
    """Writes a checkpoint of the weights that every layout can load, with Transformer Engine's layers or without.

    Args:
        source: A Hugging Face model's directory.
        target: Must not exist; its parent must.
        options: Of which ``dtype`` must be float32 or bfloat16.

    Raises:
        WeightsError: the model's files are not what its config.json says.
        ValueError: the model cannot be spread over these ranks.
        FileExistsError: the target exists.
        OSError: the disk is full, and the like.
        VerificationError: see ``Options.verify``; nothing is left of what was written.
    """
    architecture = Architecture.from_directory(source)
    directory = HfDirectory(source)
    directory.check(architecture)
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
        source: The checkpoint.
        target: Must not exist; its parent must.
        options: Of which ``dtype`` must be float32, bfloat16 or float16.
        hf: A Hugging Face directory to take config.json, tokenizer and so on from; None: they are in the checkpoint.

    Raises:
        WeightsError: the checkpoint is not what the config.json says.
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


def _unverified(written: Path) -> None:
    pass


@contextmanager
def _raise_verification_error(written: Path) -> Iterator[None]:
    """Whatever goes wrong while the result is read again, on any rank, is a reason not to publish it."""
    try:
        with raise_on_all_ranks("reading the result again"):
            yield
    except Exception as error:
        raise VerificationError(f"what was written is not what was read; nothing is left of it:\n{error}") from error


def written_bytes(model: _Model, dtype: torch.dtype) -> int:
    """Of the tensors that rank 0 writes to Hugging Face files."""
    place_chunks = {chunk for chunk, rank in chunk_owners(model.chunks, model.layout).items() if rank == 0}
    experts = range(model.architecture.mixture.experts if model.architecture.mixture else 0)
    weights = (w for chunk in place_chunks for w in tables.chunk_weights(model.architecture, chunk, experts))
    return sum(weight.elements for weight in weights if not weight.copy) * dtype.itemsize


@contextmanager
def _built_model(architecture: Architecture, options: Options, dtype: str) -> Iterator[_Model]:
    """The model with parameters that hold nothing yet."""
    actor = ActorConfig(
        dtype=dtype,  # type: ignore[arg-type]
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
    """What is not read again will not compare equal."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)


def _compare(
    model: _Model, options: Options, path: Path, alike: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Compares every tensor with a Hugging Face directory's, bit for bit. A collective of all ranks.

    Takes the whole stream even where reading failed: the stage's other ranks are in its collectives.

    Args:
        model: Its weights are compared.
        options: Of the conversion.
        path: The directory.
        alike: Brings a tensor of the model and that of the directory to the same dtype.
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
    """Integers, so that NaN is equal to itself and −0 is not 0."""
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)
