"""Reads sequences before their next token is sampled: keys, values and logits, several sequences in one pass.

A sequence is padded at its end to a multiple of 16 tokens, and is read together with others of the same padded length.
Causal attention keeps the padding out of every result. Passes have one of two shapes per length, one sequence or 256
tokens; the larger is used if :class:`.pass_shapes.PassShapes` finds the same bits in both. What is read from a sequence
therefore does not depend on what else is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from fipo_megatron.rollout.embedded.pass_shapes import PassShapes

LENGTHS = 16
"""Sequences are padded to a multiple of this number of tokens."""

PASS_TOKENS = 256
"""Tokens of a pass over several sequences."""

_KEPT = 4


@dataclass(frozen=True, eq=False)
class ReadSequence:
    """A sequence that the model has read.

    Attributes:
        layers: Keys and values of each layer, ``[heads, P, width]``.
        logits: ``[V]``, logits of the next token.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    logits: Tensor


class SequenceReader:
    """Reads sequences with a model, and keeps those that it read last.

    Args:
        module: A model of transformers.
        shapes: Shapes of its passes.
    """

    def __init__(self, module: transformers.PreTrainedModel, shapes: PassShapes) -> None:
        self._module, self._shapes = module, shapes
        self._kept: OrderedDict[bytes, ReadSequence] = OrderedDict()

    def read(self, sequences: Iterable[NDArray[np.int32]]) -> list[ReadSequence]:
        """Reads sequences, ``[P]`` int32 each; equal ones once, and those that were read last not again."""
        keys = [sequence.tobytes() for sequence in sequences]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        by_length: dict[int, list[bytes]] = {}
        for key in dict.fromkeys(keys):
            if key not in found:
                length = len(np.frombuffer(key, np.int32))
                by_length.setdefault(-(-length // LENGTHS) * LENGTHS, []).append(key)
        for length, missing in by_length.items():
            rows = self._rows(length)
            for first in range(0, len(missing), rows):
                some = missing[first : first + rows]
                tokens = [np.frombuffer(key, np.int32) for key in some]
                read = self._pass(tokens, length, rows if len(some) > 1 else 1)
                found |= dict(zip(some, read, strict=True))
        for key in keys:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return [found[key] for key in keys]

    def forget(self) -> None:
        """Forgets all sequences; their keys and values are those of other weights."""
        self._kept.clear()

    def _rows(self, length: int) -> int:
        """Returns the number of sequences of this padded length in a pass."""
        rows = PASS_TOKENS // length
        return rows if rows > 1 and self._shapes.equal(1, rows, length) else 1

    @torch.no_grad()
    def _pass(self, sequences: Sequence[NDArray[np.int32]], length: int, rows: int) -> list[ReadSequence]:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        cache = DynamicCache(config=self._module.config)
        # The last token is among the last 16 positions.
        logits = self._module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=LENGTHS).logits
        layers = _keys_and_values(cache)
        return [
            ReadSequence(
                tuple((keys[row, :, : len(tokens)], values[row, :, : len(tokens)]) for keys, values in layers),
                logits[row, len(tokens) - 1 - length],
            )
            for row, tokens in enumerate(sequences)
        ]


def _keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Returns keys and values of each layer, ``[rows, heads, length, width]``."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        found.append((layer.keys, layer.values))
    return found
