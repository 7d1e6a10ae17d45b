"""Tokenizer of the model: reading it, its stop tokens, and prompts as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fipo_megatron.config import DataConfig
from fipo_megatron.data.chat_template import ChatTemplateError, render_conversations
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.storage.json_files import one_line, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Sets of files, one of which holds the vocabulary of a tokenizer."""


class InputError(ValueError):
    """An input of a run is missing or does not fit; the message lists every problem found."""


def _unreadable_files(path: Path) -> list[str]:
    """Lists which of the files beside tokenizer.json cannot be read; transformers' errors do not name them."""
    problems = []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        try:
            read_json_object(path / name)
        except FileNotFoundError:
            continue
        except ValueError as error:
            problems.append(str(error))
    for template in (path / "chat_template.jinja", *sorted(path.glob("additional_chat_templates/*.jinja"))):
        try:
            template.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{template}: cannot be read: {one_line(error)}")
    return problems


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a model directory. Runs no code of the directory and needs no network.

    Raises:
        InputError: The directory holds no tokenizer, one without tokens, or one that cannot be read.
    """
    from transformers import AutoTokenizer  # takes a second to import

    path = Path(path)
    if not any(all((path / name).is_file() for name in names) for names in _VOCABULARIES):
        needed = ", ".join(" with ".join(names) for names in _VOCABULARIES)
        raise InputError(f"model.path = {path}: no tokenizer; expected {needed}")
    if problems := _unreadable_files(path):
        raise InputError("\n".join(problems))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
        count = tokenizer.vocab_size
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise InputError(f"model.path = {path}: no tokenizer: {type(error).__name__}: {one_line(error)}") from None
    if not count:
        raise InputError(f"model.path = {path}: an empty tokenizer: it has no tokens but added ones")
    return tokenizer


def check_chat_template(path: Path, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Raises InputError if prompts need a chat template, and the tokenizer has none or one that renders no question."""
    if data.chat_template != "tokenizer":
        return
    if not tokenizer.chat_template:
        raise InputError(
            f"model.path = {path}: its tokenizer has no chat template, and prompts are conversations; with "
            "data.chat_template=none they are plain text"
        )
    if not isinstance(tokenizer.chat_template, str | dict):
        kind = type(tokenizer.chat_template).__name__
        raise InputError(f"model.path = {path}: its chat template: expected text, got {kind}")
    try:
        render_conversations(tokenizer, [[{"role": "user", "content": "1 + 1?"}]])
    except ChatTemplateError as error:
        raise InputError(f"model.path = {path}: its chat template: {error}") from None


def read_stop_token_ids(path: Path, vocab: int) -> set[int]:
    """Returns the ids of the tokens that end a response, of generation_config.json and config.json together.

    Args:
        path: Model directory.
        vocab: Size of the model's vocabulary.

    Raises:
        InputError: A file cannot be read, or an id is not in the vocabulary.
    """
    found: set[int] = set()
    problems = []
    for name in ("generation_config.json", "config.json"):
        try:
            value = read_json_object(path / name).get("eos_token_id")
        except FileNotFoundError:
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(number) is int and 0 <= number < vocab for number in ids):
            found |= set(ids)
        else:
            problems.append(
                f"{path / name}: eos_token_id = {value!r:.200}: must be an id below vocab_size = {vocab} of "
                "config.json, or a list of such ids"
            )
    if problems:
        raise InputError("\n".join(problems))
    return found


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
