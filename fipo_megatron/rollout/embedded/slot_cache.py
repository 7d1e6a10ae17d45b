"""Keys and values of many sequences of different lengths in one batch, for models of transformers.

Token number p of a sequence is at place p of its slot, so that what a sequence computes does not depend on its
neighbours: shapes are the same whoever else is there, and places after its end contribute exact zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 64
"""Lengths are rounded up to a multiple of this: sums over masked places keep their order."""


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, ``[slots, heads, places, width]``; a pass appends one token per slot."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: :meth:`put` and :meth:`reserve` come first."""

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """The keys and values of a whole sequence, ``[heads, length, width]``."""
        self.reserve(keys)
        self.keys[slot, :, : keys.shape[1]] = keys
        self.values[slot, :, : values.shape[1]] = values

    def reserve(self, like: Tensor) -> None:
        """Room for all places that are in use."""
        slots, places = self._cache.slots, self._cache.places
        if self.keys is None:
            self.keys, self.values = (like.new_zeros(slots, like.shape[-3], places, like.shape[-1]) for _ in range(2))
        elif self.keys.shape[2] < places:
            more = (0, 0, 0, places - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, more)
            self.values = torch.nn.functional.pad(self.values, more)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.reserve(key_states[0])
        rows, at, places = self._cache.rows, self._cache.positions, self._cache.places
        self.keys[rows, :, at] = key_states[:, :, 0]
        self.values[rows, :, at] = value_states[:, :, 0]
        return self.keys[:, :, :places], self.values[:, :, :places]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.places, 0

    def get_seq_length(self) -> int:
        return self._cache.places

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """See the module.

    Args:
        layers: Of the model.
        slots: Sequences at a time; every pass has as many rows.

    Attributes:
        positions: ``[slots]`` int64: where the tokens of the next pass go.
        places: How many a pass attends to; those after a sequence's own position are masked.
    """

    def __init__(self, layers: int, slots: int) -> None:
        self.slots = slots
        self.rows = torch.arange(slots)
        self.positions = torch.zeros(slots, dtype=torch.int64)
        self.places = BLOCK
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def put(self, slot: int, cache: Cache, length: int) -> None:
        """Takes over the keys and values of one sequence that a pass of its own has computed."""
        self.places = max(self.places, rounded(length))
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            mine.put(slot, theirs.keys[0], theirs.values[0])

    def advance(self, positions: Tensor) -> Tensor:
        """Says where the tokens of the next pass go; returns its mask, ``[slots, 1, 1, places]``, true: attend."""
        self.positions = positions
        self.places = rounded(int(positions.max()) + 1)
        return (torch.arange(self.places) <= positions[:, None])[:, None, None]


def rounded(length: int) -> int:
    """Up to whole blocks."""
    return -(-length // BLOCK) * BLOCK
