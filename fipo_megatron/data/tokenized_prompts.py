"""Reads files of problems as tokenised prompts, a batch of rows at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fipo_megatron.config import DataConfig
from fipo_megatron.data.chat_template import ChatTemplateError, render_conversations
from fipo_megatron.data.prompt_table import PromptTable, record_batch
from fipo_megatron.data.prompts import DataError, Duplicates, Problem, read_problems
from fipo_megatron.data.shared_prompts import file_identity, shared_prompts
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.storage.json_files import one_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Tokenize = Callable[[str], Sequence[int]]
"""Tokenises the text of a prompt."""

_PROBLEMS_AT_ONCE = 4096
"""Problems whose texts are in memory at a time."""
_FORMAT = 1
"""Version of the prompts that processes share: programs that read the same files differently share none."""


def read_prompts(
    data: DataConfig,
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str,
    answer: str,
    share: bool = False,
) -> PromptTable:
    """Reads files of problems as prompts and leaves out those that are too long.

    Args:
        data: ``chat_template``, ``max_prompt_tokens`` and, for training, ``deduplicate`` are read.
        files: ``.parquet`` or ``.jsonl`` files.
        tokenizer: Tokenizer of the model.
        field: Configuration key that names the files: ``data.files`` or ``evaluation.files``.
        answer: Column of ``.jsonl`` files that holds the answer: ``answer``, or ``response`` for SFT.
        share: Whether processes of this host that read the same share the prompts.

    Raises:
        DataError: A file cannot be read or is not valid, or no prompt is left.
    """
    if not files:
        raise DataError(f"{field}: is empty; expected .parquet or .jsonl files")
    evaluates = field == "evaluation.files"
    drop: Duplicates = "rows" if answer == "answer" else "none"
    if data.deduplicate != "auto" and not evaluates:
        drop = data.deduplicate

    def read() -> Iterator[RecordBatch]:
        problems = read_problems(files, answer=answer, drop=drop, apart=evaluates)
        return _tokenized(problems, data, tokenizer)

    if share and all(Path(file).is_file() for file in files):
        try:
            model = [file_identity(path) for path in sorted(Path(tokenizer.name_or_path).iterdir())]
            content = [file_identity(Path(file)) for file in files]
            settings = (data.chat_template, data.max_prompt_tokens, drop, answer, evaluates, _FORMAT)
            return shared_prompts(json.dumps([content, model, settings]), read)
        except OSError as error:
            logger.warning("every process reads %s for itself: %s", field, one_line(error))
    return PromptTable(read())


def _tokenized(
    problems: Iterator[Problem], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RecordBatch]:
    """Yields the prompts of problems; logs how many are too long.

    Raises:
        DataError: A prompt has no tokens, all are too long, or template or tokenizer fail.
    """
    count = dropped = 0
    while some := list(islice(problems, _PROBLEMS_AT_ONCE)):
        prompts = tokenize(some, _texts(some, data, tokenizer), _token_ids(data, tokenizer), data.max_prompt_tokens)
        count += len(some)
        dropped += len(some) - len(prompts)
        yield record_batch(prompts)
    if dropped == count:
        raise DataError(f"data.max_prompt_tokens = {data.max_prompt_tokens}: all {dropped} prompts are longer")
    if dropped:
        logger.warning(
            "%d of %d prompts are longer than data.max_prompt_tokens = %d", dropped, count, data.max_prompt_tokens
        )


def _texts(problems: Sequence[Problem], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if data.chat_template == "none":
        return ["\n".join(message["content"] for message in problem.messages) for problem in problems]
    try:
        return render_conversations(tokenizer, [problem.messages for problem in problems])
    except ChatTemplateError as error:
        raise DataError(f"chat template of {tokenizer.name_or_path}: {problems[error.index].id}: {error}") from None


def _token_ids(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenize:
    """Returns a function that tokenises a text, and raises DataError where the tokenizer fails."""

    def token_ids(text: str) -> list[int]:
        try:
            return list(tokenizer(text, add_special_tokens=data.chat_template == "none")["input_ids"])
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            where = f"tokenizer of {tokenizer.name_or_path}"
            raise DataError(f"{where}: {type(error).__name__}: {one_line(error)}") from None

    return token_ids


def tokenize(problems: Sequence[Problem], texts: Sequence[str], tokens_of: Tokenize, longest: int) -> list[Prompt]:
    """Tokenises problems and leaves out prompts longer than ``longest`` tokens.

    Args:
        problems: Problems.
        texts: Text of each problem's prompt, with the chat template applied.
        tokens_of: Tokenises such a text.
        longest: Maximum length of a prompt in tokens.

    Raises:
        DataError: A prompt has no tokens.
    """
    prompts = []
    for problem, text in zip(problems, texts, strict=True):
        tokens = np.asarray(tokens_of(text), dtype=np.int32)
        if not len(tokens):
            raise DataError(f"{problem.id}: prompt: has no tokens")
        if len(tokens) <= longest:
            prompts.append(Prompt(problem.id, tokens, problem.answer, problem.data_source))
    return prompts
