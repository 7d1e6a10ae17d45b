"""The directory of a Hugging Face model: everything in it is read and checked here, before anything is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.config import DataConfig
from fipo_megatron.data.tokenizer import InputError, check_chat_template, load_tokenizer, read_stop_token_ids
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import HfDirectory, WeightsError, tokenizer_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory that was read.

    Attributes:
        architecture: Architecture of the model.
        tokenizer: Tokenizer of the model; None if it cannot be used.
        stop_token_ids: Ids of the tokens that end a response.
        problems: Problems found in the directory, one line each; empty if training can load it.
    """

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase | None
    stop_token_ids: tuple[int, ...]
    problems: tuple[str, ...]


def read_model_directory(path: Path, data: DataConfig, *, weights: bool, needs_eos: bool = False) -> ModelDirectory:
    """Reads config.json, tokenizer and stop tokens, and checks the weights without loading them.

    Args:
        path: Model directory.
        data: ``chat_template`` is read.
        weights: Whether the safetensors are checked, too.
        needs_eos: Whether the tokenizer itself must have an eos token, as SFT appends it to each response.

    Raises:
        InputError: config.json is missing or not that of a supported model.
    """
    try:
        architecture = Architecture.from_directory(path)
    except FileNotFoundError:
        raise InputError(f"model.path = {str(path)!r}: has no config.json; a Hugging Face model is expected") from None
    except ValueError as error:
        raise InputError("\n".join(_lines(error, path))) from None
    problems: list[str] = []
    if weights:
        try:
            directory = HfDirectory(path)
            directory.check(architecture)
            directory.check_tied(architecture)
        except WeightsError as error:
            problems += _lines(error, path)
    else:
        problems += tokenizer_problems(path / "tokenizer.json", architecture.vocab)
    tokenizer: PreTrainedTokenizerBase | None = None
    stop_token_ids: set[int] = set()
    try:
        stop_token_ids = read_stop_token_ids(path, architecture.vocab)
        if not tokenizer_problems(path / "tokenizer.json", architecture.vocab):
            tokenizer = load_tokenizer(path)
            check_chat_template(path, tokenizer, data)
    except InputError as error:
        problems += str(error).splitlines()
        tokenizer = None
    if tokenizer is not None:
        eos = tokenizer.eos_token_id
        stop_token_ids |= set() if eos is None else {eos}
        if eos is None and needs_eos:
            problems.append(f"model.path = {path}: its tokenizer has no eos token, which algorithm.kind = sft needs")
        elif not stop_token_ids:
            problems.append(
                f"model.path = {path}: neither tokenizer, generation_config.json nor config.json has an eos token"
            )
        elif max(stop_token_ids) >= architecture.vocab:
            problems.append(
                f"model.path = {path}: the tokenizer's eos token {eos} has no row in the embedding; config.json: "
                f"vocab_size = {architecture.vocab}"
            )
    return ModelDirectory(architecture, tokenizer, tuple(sorted(stop_token_ids)), tuple(problems))


def _lines(error: ValueError, path: Path) -> list[str]:
    """Returns the problems of an error, each with the directory."""
    lines = [
        line for line in str(error).splitlines() if not re.fullmatch(rf"{re.escape(str(path))}: \d+ problems?", line)
    ]
    return [line if line.startswith((f"{path}/", f"{path}: ")) else f"{path}: {line}" for line in lines]
