"""The safetensors files of a Hugging Face directory: checked as a whole, read by slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fipo_megatron.storage.json_files import one_line, read_json_object
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.placement import Piece
from fipo_megatron.weights.tables import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that weights may be stored in, by their names in safetensors."""
_EMBEDDING = "model.embed_tokens.weight"
_ROWS = 4096


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
                others = ", ".join(sorted(path.name for path in self.path.glob("*.bin")))
                hint = f"; {others}: PyTorch's own format is not read" if others else ""
                self.problems.append(f"{self.path}: holds neither {SINGLE} nor {INDEX}{hint}")
                self._all_unread = True
                return {}
            return {SINGLE: None}
        try:
            where = read_json_object(index).get("weight_map")
            if not isinstance(where, dict) or not where or not all(map(_is_file_name, where.values())):
                raise ValueError(f"{index}: weight_map: expected an object with the name of each tensor's file")
        except ValueError as error:
            self.problems.append(str(error))
            self._all_unread = True
            return {}
        listed: dict[str, set[str]] = {file: set() for file in sorted(set(where.values()))}
        for tensor, file in where.items():
            listed[file].add(tensor)
        return {**listed}

    def _open(self, name: str, tensors: set[str] | None) -> None:
        try:
            file: Any = safe_open(self.path / name, "pt")
        except FileNotFoundError:
            self._unreadable(f"{self.path / name}: missing", tensors)
            return
        except (SafetensorError, OSError, ValueError) as error:
            self._unreadable(f"{self.path / name}: truncated or corrupt: {one_line(error)}", tensors)
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

    def check_tied(self, architecture: Architecture) -> None:
        """Checks that the output weight of a tied model, if the files hold one, is the embedding. Reads both tensors.

        Raises:
            WeightsError: They differ. Megatron and transformers would drop the output weight.
        """
        if not architecture.tied:
            return
        for output in sorted(tables.tied_copies(architecture) & self.shapes.keys()):
            if self.shapes[output] != self.shapes[_EMBEDDING] or not self._are_equal(output, _EMBEDDING):
                raise WeightsError(
                    f"{self.path}: {output} differs from {_EMBEDDING}, but config.json says tie_word_embeddings = true "
                    "and it would be dropped; set tie_word_embeddings = false if the model has its own output weight"
                )

    def _are_equal(self, one: str, other: str) -> bool:
        """Returns whether two tensors of the same shape have equal values; reads some rows at a time."""
        rows = self.shapes[one][0]
        pieces = ((start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
        return all(
            torch.equal(self.read(Piece(one, 0, *piece, 0)).float(), self.read(Piece(other, 0, *piece, 0)).float())
            for piece in pieces
        )

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


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {"/", "\0"}


def tokenizer_problems(path: Path, vocab: int) -> list[str]:
    """Returns a problem if a token has no row in the embedding; rows without a token are allowed."""
    try:
        content = read_json_object(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        return [str(error)]
    model, added = content.get("model"), content.get("added_tokens") or []
    known = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(known, dict | list) or not isinstance(added, list):
        return [f"{path}: not a tokenizer: it has no model with a vocab"]
    ids = list(known.values()) if isinstance(known, dict) else [*range(len(known))]
    ids += [token.get("id") if isinstance(token, dict) else None for token in added]
    if wrong := [number for number in ids if type(number) is not int or number < 0]:
        return [f"{path}: not a tokenizer: {wrong[0]!r:.200} is not the id of a token"]
    if not ids:
        return [f"{path}: an empty tokenizer: it has no tokens"]
    if max(ids) < vocab:
        return []
    return [f"{path}: token {max(ids)} has no row in the embedding; config.json: vocab_size = {vocab}"]
