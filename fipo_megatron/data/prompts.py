"""Prompts from parquet files in the schema of DAPO-Math-17k and AIME, or from jsonl, in a seeded, resumable order.

Columns of parquet files: ``prompt`` (messages with ``role`` and ``content``), ``reward_model.ground_truth`` and,
optional, ``data_source`` and ``extra_info.index``. Keys of jsonl files: ``prompt`` (text or messages) and ``answer``;
for ``algorithm.kind = sft``, ``response`` instead of ``answer``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.prompt_table import PromptTable
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.storage.json_files import one_line, parse_json

_UNUSABLE = re.compile(r"[+-]?nan|[$*.\s]+|\\(?:boxed|text)\{\s*\}|\[\s*\]", re.IGNORECASE)
"""Right answers that nothing matches."""
logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
_ROWS_AT_ONCE = 4096
"""Rows of a parquet file in memory at a time."""


class DataError(ValueError):
    """An invalid data file; the message names file, row and column."""


@dataclass(frozen=True)
class Problem:
    """One row of a data file.

    Attributes:
        id: Identifier, unique among the files.
        messages: Conversation that poses the problem.
        answer: Right answer; in data for ``algorithm.kind = sft``, the response.
        data_source: Name of the data set.
    """

    id: str
    messages: Messages
    answer: str
    data_source: str


Duplicates = Literal["none", "rows", "prompts"]
"""Rows that are dropped: none, those equal in prompt and answer to an earlier one, or those equal in prompt."""


def read_problems(
    files: Sequence[str | Path], *, answer: str = "answer", drop: Duplicates = "rows", apart: bool = False
) -> Iterator[Problem]:
    """Reads the files row by row and yields their problems; logs the number of dropped rows at the end.

    Args:
        files: Paths that end in ``.parquet`` or ``.jsonl``.
        answer: Key of the answer in jsonl files.
        drop: Duplicates that are dropped. DAPO-Math-17k has each row a hundred times.
        apart: Whether rows of different data sources are never duplicates, so that every data set stays whole.

    Raises:
        DataError: A file cannot be read, columns are missing (the message names all), a row is invalid or has an
            empty answer, or there are no rows.
    """
    seen: dict[bytes, bytes] = {}
    ids: set[str] = set()
    rows = contradictions = 0
    for file in files:
        for problem in _problems(Path(file), answer):
            rows += 1
            if drop != "none":
                content, right = _digests(problem, apart=apart, with_answer=drop == "rows")
                if (first := seen.setdefault(content, right)) is not right:
                    contradictions += first != right
                    continue
            while problem.id in ids:
                problem = replace(problem, id=f"{problem.id}#{rows}")
            ids.add(problem.id)
            yield problem
    if not ids:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: no problems")
    if rows > len(ids):
        logger.info("%d rows, of which %d are distinct", rows, len(ids))
    if contradictions:
        logger.warning(
            "%d rows were dropped although their answer is not that of the first row with the same prompt "
            "(data.deduplicate = prompts)",
            contradictions,
        )


def _digests(problem: Problem, *, apart: bool, with_answer: bool) -> tuple[bytes, bytes]:
    """Returns digests of what makes a problem a duplicate, and of its answer; texts would need more memory."""
    right = hashlib.blake2b(problem.answer.encode(), digest_size=16).digest()
    content = json.dumps([problem.messages, problem.data_source if apart else ""]).encode()
    return hashlib.blake2b(content + right * with_answer, digest_size=16).digest(), right


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
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            _require(file, names, ("prompt", "reward_model"))
            wanted = [name for name in ("prompt", "reward_model", "data_source", "extra_info") if name in names]
            number = 0
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                for row in batch.to_pylist():
                    yield _parquet_row(file, number, row)
                    number += 1
    except DataError:
        raise
    except (OSError, ValueError, KeyError, RecursionError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {one_line(error)}") from None


def _parquet_row(file: Path, number: int, row: Mapping[str, Any]) -> Problem:
    reward, extra = row["reward_model"], row.get("extra_info")
    if not isinstance(reward, dict) or not isinstance(reward.get("ground_truth"), str):
        raise DataError(f"{file}: row {number}: reward_model.ground_truth: expected text, got {reward!r:.200}")
    _require_usable(file, number, "reward_model.ground_truth", reward["ground_truth"])
    index = extra.get("index") if isinstance(extra, dict) else None
    return _problem(
        file,
        number,
        id=f"{file.stem}:{number if index is None else index}",
        prompt=row["prompt"],
        answer=reward["ground_truth"],
        data_source=row.get("data_source"),
    )


def _jsonl(file: Path, answer: str) -> Iterator[Problem]:
    """Yields the rows of a file, which end at line feeds alone: JSON may hold the other separators of Unicode."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _json_row(file, number, line, answer)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: cannot be read: {one_line(error)}") from None


def _json_row(file: Path, number: int, line: bytes, answer: str) -> Problem:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{file}: row {number}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}: row {number}: expected an object with prompt and {answer}, got {row!r:.80}")
    _require(file, row, ("prompt", answer), number)
    if not isinstance(row[answer], str | int | float):
        raise DataError(f"{file}: row {number}: {answer}: expected text, got {row[answer]!r:.200}")
    _require_usable(file, number, answer, str(row[answer]))
    return _problem(
        file,
        number,
        id=str(row.get("id", f"{file.stem}:{number}")),
        prompt=row["prompt"],
        answer=str(row[answer]),
        data_source=row.get("data_source"),
    )


def _problem(file: Path, row: int, *, id: str, prompt: Any, answer: str, data_source: Any) -> Problem:
    """Builds a problem from the values of a row."""
    problem = Problem(id, _messages(file, row, prompt), answer, str(data_source or file.stem))
    for name, text in (
        ("id", problem.id),
        ("answer", problem.answer),
        ("data_source", problem.data_source),
        *(("prompt", part) for message in problem.messages for part in message.values()),
    ):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}: row {row}: {name}: holds a lone surrogate, {text[error.start]!a}, which is not a character"
            ) from None
    return problem


def _require(file: Path, columns: Sequence[str] | Mapping[str, Any], needed: Sequence[str], row: int = -1) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        where = f"{file}: row {row}" if row >= 0 else str(file)
        raise DataError(
            f"{where}: missing column(s) {', '.join(missing)}; there are {', '.join(columns) or 'none':.300}"
        )


def _require_usable(file: Path, row: int, column: str, value: str) -> None:
    """Refuses a text that no response can match: an empty one; as a right answer also NaN or an empty formula."""
    if not value.strip():
        raise DataError(f"{file}: row {row}: {column}: is empty")
    if column != "response" and _UNUSABLE.fullmatch(value.strip()):
        raise DataError(f"{file}: row {row}: {column}: {value!r} is no answer that a response can match")


def _messages(file: Path, row: int, value: Any) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(isinstance(m.get(key), str) for m in value for key in ("role", "content")):
        raise DataError(
            f"{file}: row {row}: prompt: expected text, or messages with role and content, got {value!r:.200}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


class PromptStream:
    """A stream of prompts in epochs. Each epoch has its own order, which depends on the seed alone.

    From the second epoch on, ids end in ``~`` and the number of the epoch, so they are unique in the run. If an id of
    the data already ends like that, as many ``~`` are used as no id has.

    Args:
        prompts: Prompts in the order of the files.
        seed: Seed of the run.
        epochs: Number of epochs; None for no end.
        shuffle: Whether epochs are shuffled; otherwise every epoch has the order of the files.
    """

    def __init__(self, prompts: PromptTable, seed: int, epochs: int | None = None, *, shuffle: bool = True) -> None:
        self._prompts, self._seed, self._epochs, self._shuffle = prompts, seed, epochs, shuffle
        self.given = 0
        """Cursor: prompts returned so far. Setting it moves the stream."""
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        endings = (re.search(r"(~+)\d+$", name) for name in prompts.column("id"))
        self._mark = "~" * (1 + max((len(ending[1]) for ending in endings if ending), default=0))

    def __call__(self, count: int) -> list[Prompt]:
        """Returns the next ``count`` prompts; fewer at the end of the last epoch."""
        found = []
        for number in range(self.given, self.given + count):
            epoch, position = divmod(number, len(self._prompts))
            if self._epochs is not None and epoch >= self._epochs:
                break
            if self._order[0] != epoch:
                self._order = epoch, self._order_of(epoch)
            prompt = self._prompts[int(self._order[1][position])]
            found.append(replace(prompt, id=f"{prompt.id}{self._mark}{epoch}") if epoch else prompt)
        self.given += len(found)
        return found

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
