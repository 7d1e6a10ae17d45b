"""The safetensors files of a Hugging Face directory: checked as a whole, read by slices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.placement import Piece
from fipo_megatron.weights.tables import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that weights may be stored in, by their names in safetensors."""


class WeightsError(ValueError):
    """Raised if a model's files do not match its config.json; the message lists every problem, one line each."""


class VerificationError(ValueError):
    """Raised if the weights that were written differ from those that were read; the message names every tensor."""


def first_line(error: BaseException) -> str:
    """Returns type and message of an error as one sentence, without the advice that torch appends."""
    lines = str(error).splitlines()
    text = next((line.strip() for line in lines if "WeightsUnpickler error:" in line), lines[0] if lines else "")
    text = text.partition("WeightsUnpickler error:")[2].partition(". Please")[0].strip() or text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class HfDirectory:
    """The tensors of a Hugging Face directory. Opening it maps the files into memory; only requested slices are read.

    Args:
        path: Directory with ``model.safetensors``, or ``model.safetensors.index.json`` and the files it lists.

    Attributes:
        shapes: Shape of each tensor.
        dtypes: Dtype of each tensor, by its name in safetensors.
        problems: Files that are missing, truncated or corrupt, tensors missing in the file that the index names, dtypes
            that cannot be loaded; one line each.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.problems: list[str] = []
        self._files: dict[str, Any] = {}
        self._unread: set[str] = set()
        self._all_unread = False
        for name, tensors in self._listed().items():
            self._open(name, tensors)

    def _listed(self) -> dict[str, set[str] | None]:
        """Returns the tensors of each file according to the index; None: all tensors of the file."""
        index = self.path / INDEX
        if not index.exists():
            if not (self.path / SINGLE).exists():
                self.problems.append(f"{self.path}: holds neither {SINGLE} nor {INDEX}")
                self._all_unread = True
                return {}
            return {SINGLE: None}
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {file: {t for t, f in where.items() if f == file} for file in sorted(set(where.values()))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(f"{index}: not an index of safetensors files: {error!r}")
            self._all_unread = True
            return {}

    def _open(self, name: str, tensors: set[str] | None) -> None:
        try:
            file: Any = safe_open(self.path / name, "pt")
        except FileNotFoundError:
            self._unreadable(f"{self.path / name}: missing", tensors)
            return
        except (SafetensorError, OSError) as error:
            self._unreadable(f"{self.path / name}: truncated or corrupt: {error}", tensors)
            return
        present = set(file.keys())
        for tensor in sorted(present if tensors is None else tensors):
            if tensor not in present:
                self.problems.append(f"{tensor}: the index says it is in {name}, which does not have it")
                continue
            part = file.get_slice(tensor)
            if part.get_dtype() not in DTYPES:
                self.problems.append(f"{tensor}: dtype {part.get_dtype()} is not supported; valid: {', '.join(DTYPES)}")
            self.shapes[tensor] = tuple(part.get_shape())
            self.dtypes[tensor] = part.get_dtype()
            self._files[tensor] = file

    def _unreadable(self, problem: str, tensors: set[str] | None) -> None:
        """Records an unreadable file, so that its tensors are not reported as missing one by one."""
        self.problems.append(problem)
        self._all_unread |= tensors is None
        self._unread |= tensors or set()

    def read_whole(self, name: str) -> Tensor:
        """Reads a whole tensor, in the dtype of the file."""
        return self.read(Piece(name, 0, 0, self.shapes[name][0], 0))

    def check(self, architecture: Architecture) -> None:
        """Raises WeightsError with all problems that prevent loading the model."""
        wanted = tables.hf_tensors(architecture)
        unread = set(wanted) if self._all_unread else self._unread
        assumed = {name: wanted.get(name, ()) for name in unread if name not in self.shapes}
        problems = self.problems + tables.check(architecture, assumed | self.shapes)
        if problems := problems + tokenizer_problems(self.path / "tokenizer.json", architecture.vocab):
            count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
            raise WeightsError(f"{self.path}: {count}\n" + "\n".join(problems))

    @property
    def training_dtype(self) -> str:
        """The dtype in which Megatron-Core can hold all tensors exactly: bfloat16 if all are bfloat16, else float32."""
        return "bfloat16" if {*self.dtypes.values()} == {"BF16"} else "float32"

    def read(self, piece: Piece) -> Tensor:
        """Reads a slice, in the dtype of the file. It is not always contiguous."""
        part = self._files[piece.tensor].get_slice(piece.tensor)
        rows = slice(piece.start, piece.stop)
        found: Tensor = part[rows] if piece.axis == 0 else part[:, rows]
        return found


def tokenizer_problems(path: Path, vocab: int) -> list[str]:
    """Returns a problem if a token has no row in the embedding; rows without a token are allowed."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["model"]["vocab"]
        ids = list(known.values()) if isinstance(known, dict) else [len(known) - 1]
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: not a tokenizer: {error!r}"]
    if largest < vocab:
        return []
    return [f"{path}: token {largest} has no row in the embedding; config.json: vocab_size = {vocab}"]
