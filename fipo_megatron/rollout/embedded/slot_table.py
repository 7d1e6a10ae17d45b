"""The responses that are being sampled, one per slot, as arrays: a pass over all slots needs no loop in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import FinishReason, TokenSpan
from fipo_megatron.rollout.embedded.drawing import Draw, Drawn
from fipo_megatron.rollout.engine import Generation, GenerationRequest

_BLOCK = 64
"""Random numbers that a slot draws from its generator at once."""
Slots = NDArray[np.int64]


@dataclass(eq=False)
class _Response:
    """State of a slot that is not in an array.

    Attributes:
        request: The request.
        random: Streams of random numbers.
        spans: Weight versions of the tokens.
        quantities: Quantities of a rule, ``[Q]`` float64 for each token; empty if it reports none.
    """

    request: GenerationRequest
    random: tuple[np.random.Generator, ...]
    spans: list[TokenSpan] = field(default_factory=list)
    quantities: list[NDArray[np.float64]] = field(default_factory=list)


class SlotTable:
    """Requests and sampled tokens of each slot.

    Args:
        slots: Number of slots.
        streams: Streams of random numbers of each request.

    Attributes:
        counts: ``[slots]`` int64, tokens sampled so far.
    """

    def __init__(self, slots: int, streams: int) -> None:
        self.counts = np.zeros(slots, np.int64)
        self._streams = streams
        self._responses: dict[int, _Response] = {}
        self._used = np.zeros(slots, np.bool_)
        self._read = np.zeros(slots, np.int64)
        """Tokens of the request."""
        self._limits = np.zeros(slots, np.int64)
        self._versions = np.zeros(slots, np.int64)
        """Weight version of the last token."""
        self._temperatures = np.ones(slots)
        self._top_p = np.ones(slots)
        self._stop_ids = np.zeros(0, np.int64)
        """Stop tokens of all requests; which of them end a request is looked up only when one is drawn."""
        self._known_stops: set[tuple[int, ...]] = set()
        self._uniform = np.zeros((streams, slots, _BLOCK))
        self._tokens = np.zeros((slots, _BLOCK), np.int32)
        self._log_probs = np.zeros((slots, _BLOCK), np.float32)
        self._selected = np.zeros((slots, _BLOCK), np.bool_)
        self._changed = np.zeros((slots, _BLOCK), np.bool_)

    def begin(self, slot: int, request: GenerationRequest) -> None:
        """Puts a request into a free slot.

        The first stream of random numbers depends on the seed of the request alone, not on the number of streams.
        """
        sampling = request.sampling
        seeds = [np.random.SeedSequence(request.seed)]
        seeds += [np.random.SeedSequence(request.seed, spawn_key=(number,)) for number in range(1, self._streams)]
        random = tuple(np.random.Generator(np.random.Philox(seed)) for seed in seeds)
        self._responses[slot] = _Response(request, random)
        self._used[slot], self.counts[slot] = True, 0
        self._read[slot], self._limits[slot] = len(request.tokens), sampling.max_tokens
        self._temperatures[slot], self._top_p[slot] = sampling.temperature, sampling.top_p
        if sampling.stop_token_ids not in self._known_stops:
            self._known_stops.add(sampling.stop_token_ids)
            self._stop_ids = np.union1d(self._stop_ids, np.array(sampling.stop_token_ids, np.int64))

    @property
    def running(self) -> Slots:
        """Slots in use, in order."""
        return np.flatnonzero(self._used)

    def all_tokens(self, slot: int) -> NDArray[np.int32]:
        """Returns the tokens of the request and those sampled so far."""
        return np.concatenate([self._responses[slot].request.tokens, self._tokens[slot, : self.counts[slot]]])

    def last(self, slots: Slots) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns the last token of each slot and its position in the sequence."""
        return self._tokens[slots, self.counts[slots] - 1], self._read[slots] + self.counts[slots] - 1

    def longest(self, slots: Slots) -> int:
        """Returns the tokens of the longest sequence, with those of its request."""
        return int((self._read[slots] + self.counts[slots]).max())

    def draw(self, slots: Slots, entropy_at: tuple[float, ...]) -> Draw:
        """Returns what the next tokens of these slots are drawn with."""
        places = self.counts[slots] % _BLOCK
        for slot in slots[places == 0].tolist():
            for stream, random in zip(self._uniform, self._responses[slot].random, strict=True):
                stream[slot] = random.random(_BLOCK)
        temperatures = torch.from_numpy(self._temperatures[slots])[:, None]
        return Draw(temperatures, self._top_p[slots], self._uniform[:, slots, places], entropy_at)

    def append(self, slots: Slots, drawn: Drawn, version: int) -> list[tuple[int, FinishReason]]:
        """Adds a token to each slot; returns the slots whose responses it ends, in order, and the reasons."""
        places = self.counts[slots]
        if places.max() == self._tokens.shape[1]:
            self._grow()
        self._tokens[slots, places], self._log_probs[slots, places] = drawn.tokens, drawn.log_probs
        self._selected[slots, places], self._changed[slots, places] = drawn.selected, drawn.changed
        for slot in slots[(places == 0) | (self._versions[slots] != version)].tolist():
            self._responses[slot].spans.append(TokenSpan(int(self.counts[slot]), version))
        self._versions[slots] = version
        if drawn.quantities is not None:
            for slot, quantities in zip(slots.tolist(), drawn.quantities, strict=True):
                self._responses[slot].quantities.append(quantities)
        self.counts[slots] += 1
        full = self.counts[slots] == self._limits[slots]
        may_stop = np.isin(drawn.tokens, self._stop_ids)
        ended: list[tuple[int, FinishReason]] = []
        for index in np.flatnonzero(full | may_stop):
            slot = int(slots[index])
            if drawn.tokens[index] in self._responses[slot].request.sampling.stop_token_ids:
                ended.append((slot, "stop"))
            elif full[index]:
                ended.append((slot, "length"))
        return ended

    def take(self, slot: int, reason: FinishReason) -> Generation:
        """Returns the response of a slot and frees it."""
        response = self._responses.pop(slot)
        self._used[slot] = False
        new = slice(self.counts[slot])
        return Generation(
            self._tokens[slot, new].copy(),
            self._log_probs[slot, new].copy(),
            tuple(response.spans),
            reason,
            self._selected[slot, new].copy(),
            self._changed[slot, new].copy(),
            np.stack(response.quantities) if response.quantities else None,
        )

    def move(self, slots: Mapping[int, int]) -> None:
        """Moves responses from the keys of a mapping to its values, which are free."""
        old, new = list(slots), list(slots.values())
        for each, place in slots.items():
            self._responses[place] = self._responses.pop(each)
        for column in (
            *(self.counts, self._read, self._limits, self._versions, self._temperatures, self._top_p),
            *(self._tokens, self._log_probs, self._selected, self._changed),
        ):
            column[new] = column[old]
        self._uniform[:, new] = self._uniform[:, old]
        self._used[old], self._used[new] = False, True

    def _grow(self) -> None:
        """Doubles the space for tokens."""
        more = ((0, 0), (0, self._tokens.shape[1]))
        self._tokens, self._log_probs = np.pad(self._tokens, more), np.pad(self._log_probs, more)
        self._selected, self._changed = np.pad(self._selected, more), np.pad(self._changed, more)
