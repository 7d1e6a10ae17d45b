"""The directory of a ``torch_dist`` checkpoint: its expected tensors, and a check of its files without Megatron.

Megatron-Core's names of tensors do not depend on the layout: they are those of Transformer Engine's layers, with layer
indices of the whole model and one stacked tensor for all experts of a layer. Beside Megatron's files, the directory
``huggingface/`` holds the model's config.json, tokenizer and so on for the conversion back.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError, tokenizer_problems
from fipo_megatron.weights.placement import Naming
from fipo_megatron.weights.tables import Shape, Weight

HUGGING_FACE = "huggingface"
"""Directory in the checkpoint with the model's files beside its weights."""

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
"""Content of metadata.json. megatron-core 0.19 would leave out the backend of the common state, which 0.16 needs."""
DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes in which Megatron-Core trains."""

PADDED = {entry.parameter for table in tables.TABLES.values() for entry in table if entry.padded}
"""Parameters with a row per token of the vocabulary, padded according to the layout."""


def _key(weight: Weight) -> str:
    name = weight.name(Naming(fused_norms=True))
    return name if weight.expert is None else name.replace(f".local_experts.{weight.expert}.", ".experts.")


def checkpoint_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Returns name and shape of every tensor of a checkpoint, in the order of layers, without padding."""
    experts = architecture.mixture.experts if architecture.mixture else 0
    found = {}
    for weight in tables.all_weights(architecture):
        if not weight.copy:
            shape = weight.shape(architecture.vocab)
            found[_key(weight)] = shape if weight.expert is None else (experts, *shape)
    return found


_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "dict", "list"},
}
"""Classes and functions in the metadata of a checkpoint, by module; names must match exactly."""


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that loads only the classes that describe a checkpoint, so that a foreign pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in ("MCoreMetadata", "MCoreSavePlan"):
            return type(name, (), {})  # empty in Megatron-Core too
        if (module, name) == ("pathlib", "PosixPath"):
            return type(name, (), {"__init__": lambda self, *parts: None})  # path of the writer; unused
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the metadata of a checkpoint")


def write_backend(path: Path) -> None:
    """Writes metadata.json, which all supported versions of Megatron-Core read."""
    (path / BACKEND).write_text(json.dumps(_FORMAT | {"common_backend_version": 1}), encoding="utf-8")


def read_metadata(path: Path) -> Metadata:
    """Reads the metadata of a checkpoint.

    Raises:
        WeightsError: the directory is not a checkpoint, or its saving did not finish.
    """
    try:
        text = json.loads((path / BACKEND).read_text(encoding="utf-8"))
        content = (path / METADATA).read_bytes()
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a torch_dist checkpoint: {error}") from error
    if not isinstance(text, dict):
        raise WeightsError(f"{path / BACKEND}: expected {_FORMAT}")
    if wrong := {key: text.get(key) for key, value in _FORMAT.items() if text.get(key) != value}:
        raise WeightsError(f"{path / BACKEND}: {wrong}: expected {_FORMAT}")
    try:
        found = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise any error
        raise WeightsError(f"{path / METADATA}: truncated or corrupt: {error!r}") from error
    if not isinstance(found, Metadata):
        raise WeightsError(f"{path / METADATA}: holds a {type(found).__name__}, not the metadata of a checkpoint")
    return found


def check(path: Path, architecture: Architecture, companions: Path | None = None) -> torch.dtype:
    """Compares a checkpoint with the model that it should hold. Reads only names, shapes and file sizes.

    Args:
        path: Directory of the checkpoint.
        architecture: Architecture of the model.
        companions: Hugging Face directory with the tokenizer; None: that in the checkpoint.

    Returns:
        A dtype that represents all weights exactly.

    Raises:
        WeightsError: all problems that prevent loading the checkpoint, one line each.
    """
    metadata = read_metadata(path)
    found = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    wanted = checkpoint_tensors(architecture)
    problems = _file_problems(path, metadata)
    for key, shape in wanted.items():
        if key not in found:
            problems.append(f"{key}: missing, expected {list(shape)}")
            continue
        size, dtype = tuple(found[key].size), found[key].properties.dtype
        if size[1:] != shape[1:] or (size[0] < shape[0] if key in PADDED else size[0] != shape[0]):
            problems.append(f"{key}: has shape {list(size)}, expected {list(shape)}")
        if dtype not in DTYPES:
            problems.append(f"{key}: dtype {dtype} is not supported; valid: {', '.join(map(str, DTYPES))}")
    problems += [
        f"{key}: unexpected; {architecture.name} has no such tensor"
        for key in found
        if key not in wanted and not key.startswith("optimizer.")
    ]
    problems += [
        f"{key}: parts of it are missing" for key in found if key in wanted and not _is_complete(key, metadata)
    ]
    problems += tokenizer_problems((companions or path / HUGGING_FACE) / "tokenizer.json", architecture.vocab)
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise WeightsError(f"{path}: {count}\n" + "\n".join(problems))
    return torch.bfloat16 if {found[key].properties.dtype for key in wanted} == {torch.bfloat16} else torch.float32


def _is_complete(key: str, metadata: Metadata) -> bool:
    """Returns whether every element of a tensor is in some file."""
    tensor = metadata.state_dict_metadata[key]
    assert isinstance(tensor, TensorStorageMetadata)
    stored = [chunk for chunk in tensor.chunks if MetadataIndex(key, chunk.offsets) in metadata.storage_data]
    inside = all(
        offset >= 0 and offset + size <= whole
        for chunk in stored
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
    )
    return inside and sum(chunk.sizes.numel() for chunk in stored) == tensor.size.numel()


def check_files(path: Path) -> None:
    """Raises WeightsError with every file of a checkpoint that is missing or too short."""
    if problems := _file_problems(path, read_metadata(path)):
        raise WeightsError("\n".join(problems))


def companion_directory(checkpoint: Path, hf: Path | None) -> Path:
    """Returns the Hugging Face directory that belongs to a checkpoint: ``hf``, or the one in the checkpoint.

    Raises:
        WeightsError: the directory has no config.json.
    """
    found = hf or checkpoint / HUGGING_FACE
    if not (found / "config.json").is_file():
        raise WeightsError(f"{found / 'config.json'}: missing; name a Hugging Face directory that has the model's")
    return found


def _file_problems(path: Path, metadata: Metadata) -> list[str]:
    """Returns problems of files that are missing, or end before the tensors that they should hold."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    problems = [] if (path / COMMON).is_file() else [f"{path / COMMON}: missing"]
    for name, end in sorted(ends.items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif (size := file.stat().st_size) < end:
            problems.append(f"{file}: truncated: {size} bytes, expected {end}")
    return problems
