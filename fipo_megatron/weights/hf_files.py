"""Writes the files of a Hugging Face directory, with safetensors as a stream.

The position of every tensor follows from names and shapes. Every rank knows it without communication, writes its own
tensors in any order and holds at most one at a time.

A safetensors file consists of 8 bytes with the length of the header, little-endian; the header, JSON with dtype, shape
and offsets of every tensor; and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo_megatron.weights.hf_directory import DTYPES, INDEX, SINGLE
from fipo_megatron.weights.tables import Shape

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a complete model beside its weights and config.json, copied if the source has them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file before it is written.

    Attributes:
        name: Name in the directory.
        owner: Rank that writes the file.
        header: First bytes of the file: length and JSON header.
        offsets: Offset of each tensor's first byte in the file.
        size: Size of the file in bytes.
    """

    name: str
    owner: int
    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_files(tensors: Iterable[tuple[str, Shape, int]], dtype: torch.dtype, max_file_bytes: int) -> list[TensorFile]:
    """Assigns tensors to files in order; a file has one owner and a bounded size, unless a single tensor is larger.

    Args:
        tensors: Name, shape and owner of each tensor.
        dtype: Dtype of all tensors on disk.
        max_file_bytes: Maximum bytes of the tensors in a file.
    """
    groups: list[tuple[int, list[tuple[str, Shape]]]] = []
    filled = 0
    for name, shape, owner in tensors:
        size = math.prod(shape) * dtype.itemsize
        if not groups or groups[-1][0] != owner or filled + size > max_file_bytes:
            groups.append((owner, []))
            filled = 0
        groups[-1][1].append((name, shape))
        filled += size
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = [SINGLE] if len(groups) == 1 else names
    return [_plan_file(name, owner, part, dtype) for name, (owner, part) in zip(names, groups, strict=True)]


def _plan_file(name: str, owner: int, tensors: list[tuple[str, Shape]], dtype: torch.dtype) -> TensorFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors itself aligns them
    first = 8 + len(text)
    offsets = {tensor: first + header[tensor]["data_offsets"][0] for tensor, _ in tensors}
    return TensorFile(name, owner, len(text).to_bytes(8, "little") + text, offsets, first + end)


class TensorWriter:
    """Writer of the tensors of planned files, in any order, each exactly once.

    Args:
        directory: Existing directory.
        files: Files to write; created immediately.
        dtype: Dtype passed to :func:`plan_files`.
    """

    def __init__(self, directory: Path, files: Iterable[TensorFile], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._handles: list[int] = []
        self._left: dict[str, tuple[int, int]] = {}
        try:
            for file in files:
                handle = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._handles.append(handle)
                _write(handle, memoryview(file.header), 0)
                self._left |= {tensor: (handle, offset) for tensor, offset in file.offsets.items()}
        except OSError:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Casts a tensor to the dtype of the files and writes it.

        Raises:
            KeyError: the tensor is not planned, or was written already.
            OSError: writing failed, for example because the disk is full.
        """
        handle, offset = self._left.pop(name)
        flat = tensor.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8)
        _write(handle, flat.numpy().data, offset)

    def finish(self) -> None:
        """Flushes all files to disk.

        Raises:
            RuntimeError: a planned tensor was not written.
        """
        if self._left:
            raise RuntimeError(f"tensors that were planned but not written: {', '.join(sorted(self._left))}")
        for handle in self._handles:
            os.fsync(handle)

    def close(self) -> None:
        """Closes the files, as leaving the ``with`` block does."""
        for handle in self._handles:
            os.close(handle)
        self._handles.clear()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def check_source(source: Path) -> None:
    """Raises FileNotFoundError if the source has no config.json, which :func:`add_companions` needs."""
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source / 'config.json'}: missing")


def add_companions(source: Path, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Copies the files beside the weights: config.json and those of :data:`COMPANIONS` that exist.

    Args:
        source: Hugging Face directory to copy from.
        directory: Existing directory to copy to.
        dtype: Dtype of the weights to set in config.json; None: config.json is copied unchanged.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    if dtype is None:
        shutil.copyfile(source / "config.json", directory / "config.json")
    else:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(directory / "config.json", config)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def add_index(directory: Path, files: list[TensorFile]) -> None:
    """Writes the index of tensors and files if there is more than one file."""
    if len(files) > 1:
        total = sum(file.size - len(file.header) for file in files)
        where = {tensor: file.name for file in files for tensor in file.offsets}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
