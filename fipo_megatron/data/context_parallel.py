"""The zigzag layout of context parallelism as a value object.

Under context parallelism of size R every sequence is cut into 2R chunks of equal length, and rank r holds the chunks r
and 2R−1−r, so causal attention costs every rank the same. Megatron-Core and Transformer Engine use this layout for
packed sequences. Rank and size are arguments, so one process can build and check all ranks of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CpLayout:
    """The layout of one rank: its chunks of every sequence.

    Attributes:
        size: R, the ranks of the context-parallel group.
        rank: Rank of this process in the group.
    """

    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank: must be in [0, size), got rank {self.rank} of size {self.size}")

    @property
    def num_chunks(self) -> int:
        """Number of chunks of a sequence. A padded length must be a multiple of it."""
        return 2 * self.size if self.size > 1 else 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks that this rank holds, in the order of its slots."""
        return (self.rank, self.num_chunks - 1 - self.rank) if self.size > 1 else (0,)

    @property
    def owners(self) -> tuple[tuple[int, int], ...]:
        """``(rank, slot)`` of every chunk in time order, as :class:`.SequenceShards` takes it."""
        held = {
            chunk: (rank, slot)
            for rank in range(self.size)
            for slot, chunk in enumerate(CpLayout(self.size, rank).chunks)
        }
        return tuple(held[chunk] for chunk in range(self.num_chunks))

    def padded_length(self, length: int) -> int:
        """Rounds the length of a sequence up so that all chunks have the same length."""
        return -(-length // self.num_chunks) * self.num_chunks

    def padded_total(self, tokens: int, multiple_of: int) -> int:
        """Rounds the tokens of a micro-batch up so that each rank's part is a multiple of ``multiple_of``.

        Args:
            tokens: Sum of the padded lengths of the sequences.
            multiple_of: Divisor of the tokens of one rank. Sequence parallelism requires the tensor-parallel size; FP8
                recipes require more.
        """
        step = math.lcm(self.num_chunks, self.size * multiple_of)
        return -(-tokens // step) * step

    def chunk_lengths(self, cu_seqlens: Sequence[int] | NDArray[Any]) -> list[int]:
        """Returns the tokens in one chunk of each packed sequence.

        Args:
            cu_seqlens: Boundaries of the padded sequences, ``[S + 1]``, from 0.

        Raises:
            ValueError: A sequence is empty or cannot be cut into equal chunks.
        """
        lengths = np.diff(np.asarray(cu_seqlens))
        for sequence, length in enumerate(lengths):
            if length <= 0 or length % self.num_chunks:
                raise ValueError(
                    f"cu_seqlens: sequence {sequence} has {length} tokens; context parallelism of size {self.size} "
                    f"needs a positive multiple of {self.num_chunks}"
                )
        return [int(length) // self.num_chunks for length in lengths]

    def indices(self, cu_seqlens: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        """Returns the indices of this rank's tokens into the packed tokens, in this rank's order: ``[T / R]``."""
        starts = np.asarray(cu_seqlens)[:-1]
        return np.concatenate(
            [
                start + chunk * length + np.arange(length, dtype=np.int64)
                for start, length in zip(starts, self.chunk_lengths(cu_seqlens), strict=True)
                for chunk in self.chunks
            ]
        )

    def slice(self, packed: NDArray[Any], cu_seqlens: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
        """Returns this rank's part ``[T / R, ...]`` of a packed per-token array ``[T, ...]``."""
        return packed[self.indices(cu_seqlens)]
