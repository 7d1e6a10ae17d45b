"""Keys and values of many sequences of different lengths in one batch, for models of transformers.

Token number p of a sequence is at position p of its slot, so that what a sequence computes does not depend on its
neighbours: shapes are the same whichever sequences are present, and positions after its end contribute exact zeros.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 64
"""Lengths are rounded up to a multiple of this: sums over masked positions keep their order."""


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # untyped in transformers
    """Keys and values of one layer, ``[slots, heads, places, width]``; a pass appends a token to each of its slots."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self._cache: SlotCache = weakref.proxy(
            cache
        )  # without a cycle, so that a cache that is dropped is freed at once

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: :meth:`reserve` allocates the tensors."""

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values of a whole sequence, ``[heads, length, width]``, in each of these slots."""
        all_keys, all_values = self.reserve(keys)
        all_keys[slots, :, : keys.shape[1]] = keys
        all_values[slots, :, : values.shape[1]] = values

    def move(self, old: Tensor, new: Tensor, length: int) -> None:
        """Copies the first ``length`` positions of slots to other slots."""
        for tensor in (self.keys, self.values):
            assert tensor is not None
            tensor[new, :, :length] = tensor[old, :, :length]

    def reserve(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values with space for all positions in use; ``like`` is ``[heads, length, width]``."""
        slots, places = self._cache.slots, self._cache.places
        if self.keys is None or self.values is None:
            keys, values = (like.new_zeros(slots, like.shape[-3], places, like.shape[-1]) for _ in range(2))
        elif self.keys.shape[2] < places:
            more = (0, 0, 0, places - self.keys.shape[2])
            keys = torch.nn.functional.pad(self.keys, more)
            values = torch.nn.functional.pad(self.values, more)
        else:
            return self.keys, self.values
        self.keys, self.values = keys, values
        self._cache.on_allocation()
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.reserve(key_states[0])
        at, places = self._cache.positions, self._cache.places
        width = len(at)
        rows = self._cache.rows[:width]
        keys[rows, :, at] = key_states[:, :, 0]
        values[rows, :, at] = value_states[:, :, 0]
        return keys[:width, :, :places], values[:width, :, :places]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.places, 0

    def get_seq_length(self) -> int:
        return self._cache.places

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Keys and values of all layers, one sequence per slot.

    Args:
        layers: Number of layers of the model.
        slots: Number of sequences.
        dtype: Data type of the queries.
        device: Device of the tensors.
        on_allocation: Callback after tensors for keys and values were replaced by larger ones.

    Attributes:
        positions: ``[rows]`` int64, positions of the next pass's tokens in the first ``rows`` slots.
        places: Number of positions that a pass attends to; those after a sequence's own position are masked.
    """

    def __init__(
        self, layers: int, slots: int, dtype: torch.dtype, device: torch.device, on_allocation: Callable[[], None]
    ) -> None:
        self.slots = slots
        self.device = device
        self.on_allocation = on_allocation
        self.rows = torch.arange(slots, device=device)
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self.places = BLOCK
        self._dtype = dtype
        self._slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def put(self, slots: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies the keys and values of a sequence, ``[heads, length, width]`` per layer, into each of these slots."""
        self.places = max(self.places, rounded(layers[0][0].shape[1]))
        for mine, (keys, values) in zip(self._slot_layers, layers, strict=True):
            mine.put(torch.tensor(slots), keys, values)

    def move(self, slots: Mapping[int, int], length: int) -> None:
        """Moves sequences of at most ``length`` tokens from the keys of a mapping to its values, which are free."""
        old, new = torch.tensor(list(slots)), torch.tensor(list(slots.values()))
        for layer in self._slot_layers:
            layer.move(old, new, length)

    def advance(self, positions: Tensor) -> Tensor:
        """Sets the positions of the next pass's tokens, ``[rows]`` int64 on the CPU, in the first slots.

        Returns:
            The mask of the pass, ``[rows, 1, 1, places]`` in the data type of the queries: 0 where a token attends,
            else −∞.
        """
        self.places = rounded(int(positions.max()) + 1)
        self.positions = positions.to(self.device)
        hidden = torch.arange(self.places, device=self.device) > self.positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self.device).masked_fill_(hidden, -math.inf)
        return mask[:, None, None]


def rounded(length: int) -> int:
    """Returns a length rounded up to a multiple of :data:`BLOCK`."""
    return -(-length // BLOCK) * BLOCK
