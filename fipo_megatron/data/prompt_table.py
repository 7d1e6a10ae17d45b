"""Prompts as Arrow record batches: four bytes per token, in memory or in a file that processes map into theirs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fipo_megatron.data.trajectory import Prompt

if TYPE_CHECKING:
    import pyarrow

_COLUMNS = ("id", "tokens", "ground_truth", "data_source")


class PromptTable(Sequence[Prompt]):
    """A sequence of prompts; each access builds one prompt from its row.

    Args:
        batches: Record batches of :func:`record_batch`.
    """

    def __init__(self, batches: Iterable[pyarrow.RecordBatch]) -> None:
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    @classmethod
    def from_prompts(cls, prompts: Sequence[Prompt]) -> PromptTable:
        """Returns a table of the given prompts."""
        return cls([record_batch(prompts)])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} prompts, got index {index}")
        number = bisect_right(self._ends, index)
        batch = self._batches[number]
        row = index - self._ends[number] + len(batch)
        name, tokens, ground_truth, data_source = (batch.column(column)[row] for column in _COLUMNS)
        return Prompt(name.as_py(), tokens.values.to_numpy(), ground_truth.as_py(), data_source.as_py())

    def column(self, name: str) -> Iterator[Any]:
        """Yields the values of a column other than the tokens: ``id``, ``ground_truth`` or ``data_source``."""
        for batch in self._batches:
            yield from batch.column(name).to_pylist()


def schema() -> pyarrow.Schema:
    """Returns the schema of the record batches."""
    import pyarrow

    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("tokens", pyarrow.list_(pyarrow.int32())),
            ("ground_truth", pyarrow.string()),
            ("data_source", pyarrow.string()),
        ]
    )


def record_batch(prompts: Sequence[Prompt]) -> pyarrow.RecordBatch:
    """Returns prompts as a record batch."""
    import pyarrow

    columns = [
        [prompt.id for prompt in prompts],
        [prompt.tokens for prompt in prompts],
        [prompt.ground_truth for prompt in prompts],
        [prompt.data_source for prompt in prompts],
    ]
    arrays = [pyarrow.array(values, field.type) for values, field in zip(columns, schema(), strict=True)]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema())


def write_batches(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> None:
    """Writes record batches to an Arrow IPC file, each as soon as it is there."""
    import pyarrow

    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)


def map_batches(file: Path) -> list[pyarrow.RecordBatch]:
    """Returns the record batches of an Arrow IPC file, which is mapped and not read; empty if it is not complete."""
    import pyarrow

    if not file.stat().st_size:
        return []
    try:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pyarrow.ArrowInvalid:  # its writer was killed
        return []
