"""Prompts from files: parquet in the schema of DAPO-Math-17k and AIME, or jsonl; in a seeded order that can be resumed.

Parquet: ``prompt`` (messages with ``role`` and ``content``), ``reward_model.ground_truth``, and where they are there
``data_source`` and ``extra_info.index``. jsonl: ``prompt`` (text or messages) and ``answer``; for
``algorithm.kind = sft``, ``response``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Prompt

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
Tokenize = Callable[[Messages], Sequence[int]]
"""Token ids of a conversation that the model is to continue: chat template applied."""


class DataError(ValueError):
    """A data file is not what it should be; the message names file, row and column."""


@dataclass(frozen=True)
class Problem:
    """A row of a file.

    Attributes:
        id: Unique among the files.
        messages: What is asked.
        answer: The right one; in data for ``algorithm.kind = sft``, the response.
        data_source: The data set that it comes from.
    """

    id: str
    messages: Messages
    answer: str
    data_source: str


def read_problems(
    files: Sequence[str | Path], *, answer: str = "answer", once: bool = True, apart: bool = False
) -> list[Problem]:
    """All rows of the files.

    Args:
        files: ``.parquet`` or ``.jsonl``.
        answer: The column of jsonl files that holds the answer.
        once: Take rows that say the same once: DAPO-Math-17k has each a hundred times.
        apart: Rows of different data sources do not say the same: every data set is evaluated whole.

    Raises:
        DataError: a file cannot be read, columns are missing (all are named), a row is not valid, or nothing is there.
    """
    found: list[Problem] = []
    seen: set[tuple[str, str, str]] = set()
    ids: set[str] = set()
    rows = 0
    for file in files:
        for problem in _problems(Path(file), answer):
            rows += 1
            said = json.dumps(problem.messages), problem.answer, problem.data_source if apart else ""
            if once and said in seen:
                continue
            if problem.id in ids:
                problem = replace(problem, id=f"{problem.id}#{rows}")
            seen.add(said)
            ids.add(problem.id)
            found.append(problem)
    if not found:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: no problems")
    if rows > len(found):
        logger.info("%d rows, %d of them different", rows, len(found))
    return found


def _problems(file: Path, answer: str) -> Iterator[Problem]:
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".jsonl":
        yield from _jsonl(file, answer)
    else:
        raise DataError(f"{file}: expected a name that ends in .parquet or .jsonl")


def _parquet(file: Path) -> Iterator[Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    _require(file, table.column_names, ("prompt", "reward_model"))
    wanted = [name for name in ("prompt", "reward_model", "data_source", "extra_info") if name in table.column_names]
    for number, row in enumerate(table.select(wanted).to_pylist()):
        reward, extra = row["reward_model"], row.get("extra_info")
        if not isinstance(reward, dict) or not isinstance(reward.get("ground_truth"), str):
            raise DataError(f"{file}: row {number}: reward_model.ground_truth: expected text, got {reward!r}")
        index = extra.get("index") if isinstance(extra, dict) else None
        yield Problem(
            id=f"{file.stem}:{number if index is None else index}",
            messages=_messages(file, number, row["prompt"]),
            answer=reward["ground_truth"],
            data_source=str(row.get("data_source") or file.stem),
        )


def _jsonl(file: Path, answer: str) -> Iterator[Problem]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}: row {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number}: expected an object with prompt and {answer}, got {line[:80]!r}")
        _require(file, row, ("prompt", answer), number)
        if not isinstance(row[answer], str | int | float):
            raise DataError(f"{file}: row {number}: {answer}: expected text, got {row[answer]!r}")
        yield Problem(
            id=str(row.get("id", f"{file.stem}:{number}")),
            messages=_messages(file, number, row["prompt"]),
            answer=str(row[answer]),
            data_source=str(row.get("data_source") or file.stem),
        )


def _require(file: Path, columns: Sequence[str] | Mapping[str, Any], needed: Sequence[str], row: int = -1) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        where = f"{file}: row {row}" if row >= 0 else str(file)
        raise DataError(f"{where}: missing column(s) {', '.join(missing)}; there are {', '.join(columns) or 'none'}")


def _messages(file: Path, row: int, value: Any) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(isinstance(m.get(key), str) for m in value for key in ("role", "content")):
        raise DataError(f"{file}: row {row}: prompt: expected text, or messages with role and content, got {value!r}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def tokenize(problems: Sequence[Problem], tokens_of: Tokenize, longest: int) -> list[Prompt]:
    """Prompts of at most so many tokens; how many are longer is logged.

    Raises:
        DataError: all are longer.
    """
    prompts, left_out = [], 0
    for problem in problems:
        tokens = np.asarray(tokens_of(problem.messages), dtype=np.int32)
        if len(tokens) > longest:
            left_out += 1
        else:
            prompts.append(Prompt(problem.id, tokens, problem.answer, problem.data_source))
    if not prompts:
        raise DataError(f"data.max_prompt_tokens = {longest}: all {left_out} prompts are longer")
    if left_out:
        logger.warning("%d of %d prompts are longer than data.max_prompt_tokens = %d", left_out, len(problems), longest)
    return prompts


class PromptStream:
    """Prompts for ever, each epoch in an order of its own that only the seed decides.

    From the second epoch on, ids end in ``~`` and the number of the epoch: they are unique in the run.

    Args:
        prompts: In the order of the files.
        seed: Of the run.
        epochs: How often each prompt is given; None: for ever.
        shuffle: False: the order of the files in every epoch.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, epochs: int | None = None, *, shuffle: bool = True
    ) -> None:
        self._prompts, self._seed, self._epochs, self._shuffle = tuple(prompts), seed, epochs, shuffle
        self.given = 0
        """The cursor: prompts given so far. May be set."""
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __call__(self, count: int) -> list[Prompt]:
        """The next prompts; fewer where there are no more."""
        found = []
        for number in range(self.given, self.given + count):
            epoch, place = divmod(number, len(self._prompts))
            if self._epochs is not None and epoch >= self._epochs:
                break
            if self._order[0] != epoch:
                self._order = epoch, self._order_of(epoch)
            prompt = self._prompts[self._order[1][place]]
            found.append(replace(prompt, id=f"{prompt.id}~{epoch}") if epoch else prompt)
        self.given += len(found)
        return found

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
