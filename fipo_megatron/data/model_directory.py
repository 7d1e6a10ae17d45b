"""The directory of a Hugging Face model: everything in it is read and checked here, before anything is built."""

from __future__ import annotations

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
        raise InputError("\n".join(f"{path}: {line}" for line in _lines(error, path))) from None
    problems: list[str] = []
    unusable = tokenizer_problems(path / "tokenizer.json", architecture.vocab)
    if weights:
        try:
            directory = HfDirectory(path)
            directory.check(architecture)
            directory.check_tied(architecture)
        except WeightsError as error:
            problems += str(error).splitlines()
    else:
        problems += unusable
    tokenizer: PreTrainedTokenizerBase | None = None
    stop_token_ids: tuple[int, ...] = ()
    if not unusable:
        try:
            tokenizer = load_tokenizer(path)
            if needs_eos and tokenizer.eos_token_id is None:
                problems.append(
                    f"model.path = {path}: its tokenizer has no eos token, which algorithm.kind = sft needs"
                )
            stop_token_ids = read_stop_token_ids(path, tokenizer, architecture.vocab)
            check_chat_template(path, tokenizer, data)
        except InputError as error:
            problems += str(error).splitlines()
            tokenizer = None
    return ModelDirectory(architecture, tokenizer, stop_token_ids, tuple(problems))


def _lines(error: ValueError, path: Path) -> list[str]:
    """Returns the lines of an error, without the directory where they begin with it."""
    return [line.removeprefix(f"{path}/") for line in str(error).splitlines()]
