"""Tokenizer of the model: reading it, its stop tokens, and prompts as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fipo_megatron.config import DataConfig
from fipo_megatron.data.prompts import DataError, Messages, read_problems, tokenize
from fipo_megatron.data.trajectory import Prompt, Trajectory


class InputError(ValueError):
    """An input of a run is missing or does not fit; the message lists every problem found."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a model directory.

    Raises:
        InputError: The directory holds no tokenizer, or one that cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"model.path = {path}: no tokenizer: {error}") from None
    return tokenizer


def check_chat_template(path: Path, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Raises InputError if prompts need a chat template and the tokenizer has none."""
    if not tokenizer.chat_template and data.chat_template == "tokenizer":
        raise InputError(
            f"model.path = {path}: its tokenizer has no chat template, and prompts are conversations; with "
            "data.chat_template=none they are plain text"
        )


def read_stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a response, sorted: of the tokenizer and of generation_config.json.

    Raises:
        InputError: Neither names an end-of-sequence token.
    """
    found = {tokenizer.eos_token_id}
    if (file := path / "generation_config.json").is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named}
    found.discard(None)
    if not found:
        raise InputError(f"model.path = {path}: neither tokenizer nor generation_config.json has an eos token")
    return tuple(sorted(found))


def read_prompts(
    data: DataConfig, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, field: str, answer: str
) -> list[Prompt]:
    """Reads files of problems as prompts and leaves out those that are too long.

    Args:
        data: ``chat_template`` and ``max_prompt_tokens`` are read.
        files: ``.parquet`` or ``.jsonl`` files.
        tokenizer: Tokenizer of the model.
        field: Configuration key that names the files: ``data.files`` or ``evaluation.files``.
        answer: Column of ``.jsonl`` files that holds the answer: ``answer``, or ``response`` for SFT.

    Raises:
        DataError: A file cannot be read or is not valid, or no prompt is left.
    """
    if not files:
        raise DataError(f"{field}: is empty; expected .parquet or .jsonl files")

    def token_ids(messages: Messages) -> list[int]:
        if data.chat_template == "none":
            return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    problems = read_problems(files, answer=answer, once=answer == "answer", apart=field == "evaluation.files")
    return tokenize(problems, token_ids, data.max_prompt_tokens)


def sft_example(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Trajectory:
    """Returns the example response of a prompt as a trajectory to fine-tune on.

    Args:
        prompt: Prompt whose ``ground_truth`` is the response to learn.
        tokenizer: Tokenizer of the model; its end-of-sequence token is appended.
        max_tokens: Longer responses are truncated to this many tokens.
    """
    ids = tokenizer(prompt.ground_truth, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tokens = np.array(ids[:max_tokens], np.int32)
    return Trajectory(
        prompt=prompt,
        sample=0,
        tokens=tokens,
        behaviour_log_probs=np.zeros(len(tokens), np.float32),
        mask=np.ones(len(tokens), np.bool_),
        finish_reason="stop" if len(ids) <= max_tokens else "length",
        advantage=0.0,
    )
