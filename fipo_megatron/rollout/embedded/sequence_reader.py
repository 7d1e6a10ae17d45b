"""Reads sequences before their next token is sampled: keys, values and logits, several sequences in one pass.

A sequence is padded at its end to a multiple of 16 tokens and is read together with others of the same padded length.
Causal attention keeps the padding out of every result. Passes have one of two shapes per length, one sequence or 256
tokens; the larger is used if :class:`.pass_shapes.PassShapes` finds the same bits in both. What is read from a sequence
therefore does not depend on what else is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from fipo_megatron.rollout.embedded.pass_shapes import KEPT_LOGITS, PassShapes, read_pass

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

    def read(self, sequences: Sequence[NDArray[np.int32]]) -> Iterator[tuple[list[int], ReadSequence]]:
        """Reads sequences, ``[P]`` int32 each; equal ones once, and those that were read last not again.

        Yields:
            The places of equal sequences in ``sequences``, and what was read of them.
        """
        places: dict[bytes, list[int]] = {}
        for place, sequence in enumerate(sequences):
            places.setdefault(sequence.tobytes(), []).append(place)
        by_length: dict[int, list[bytes]] = {}
        for key in places:
            if key in self._kept:
                yield places[key], self._kept[key]
            else:
                length = len(np.frombuffer(key, np.int32))
                by_length.setdefault(-(-length // KEPT_LOGITS) * KEPT_LOGITS, []).append(key)
        for length, missing in by_length.items():
            rows = self._rows(length)
            for first in range(0, len(missing), rows):
                some = missing[first : first + rows]
                tokens = [np.frombuffer(key, np.int32) for key in some]
                for key, read in zip(some, self._pass(tokens, length, rows if len(some) > 1 else 1), strict=True):
                    self._keep(key, read)
                    yield places[key], read

    def forget(self) -> None:
        """Forgets all sequences; their keys and values are those of other weights."""
        self._kept.clear()

    def _keep(self, key: bytes, read: ReadSequence) -> None:
        self._kept[key] = read
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def _rows(self, length: int) -> int:
        """Returns the number of sequences of this padded length in a pass."""
        rows = PASS_TOKENS // length
        return rows if rows > 1 and self._shapes.equal(1, rows, length) else 1

    def _pass(self, sequences: Sequence[NDArray[np.int32]], length: int, rows: int) -> list[ReadSequence]:
        """Reads sequences of one padded length. What is returned holds no memory of the others."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        logits, *layers = read_pass(self._module, ids)
        found = []
        for row, tokens in enumerate(sequences):
            own = [tensor[row, :, : len(tokens)].clone() for tensor in layers]
            pairs = tuple(zip(own[::2], own[1::2], strict=True))
            found.append(ReadSequence(pairs, logits[row, len(tokens) - 1 - length].clone()))
        return found
