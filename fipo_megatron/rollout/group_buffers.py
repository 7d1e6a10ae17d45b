"""Groups of responses as bytes on their way to other ranks.

Each array is copied once, into the buffer that is sent; the arrays of the groups that are read are views of the buffer
that was received. Files (checkpoints, rollout dumps) have another format: :mod:`.rollout.carry_over`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Group
from fipo_megatron.rollout.carry_over import RECORDS, ArrayPacker, arrays_to_groups

_KINDS = ("int32", "float32", "bool", RECORDS)
_HEADER = 8 * len(_KINDS)
_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class GroupBytes:
    """Groups that can be written into a buffer.

    A buffer begins with the bytes of each kind of array as int64, and has the arrays in the same order.

    Attributes:
        parts: Arrays of each kind of ``_KINDS``.
    """

    parts: tuple[list[NDArray[Any]], ...]

    @classmethod
    def of(cls, groups: Iterable[Group]) -> GroupBytes:
        """Describes groups. Copies no tokens."""
        packer = ArrayPacker(uniform_masks=True)
        records = json.dumps({"groups": [packer.group(group) for group in groups], "unfinished": []}).encode()
        kinds = [packer.parts[kind] for kind in _KINDS[:-1]]
        return cls((*kinds, [np.frombuffer(records, np.uint8)]))

    @property
    def size(self) -> int:
        """Number of bytes, a multiple of 8, so that a buffer can follow another."""
        size = _HEADER + sum(array.nbytes for kind in self.parts for array in kind)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def write(self, buffer: NDArray[np.uint8]) -> None:
        """Writes the groups into a buffer of :attr:`size` bytes."""
        sizes = [sum(array.nbytes for array in kind) for kind in self.parts]
        buffer[:_HEADER] = np.array(sizes, np.int64).view(np.uint8)
        at = _HEADER
        for kind in self.parts:
            for array in kind:
                buffer[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
                at += array.nbytes


def read_groups(buffer: NDArray[np.uint8]) -> list[Group]:
    """Reads groups that :meth:`GroupBytes.write` wrote; their arrays are read-only views of the buffer."""
    buffer = buffer.view()
    buffer.flags.writeable = False
    ends = np.cumsum(buffer[:_HEADER].view(np.int64)) + _HEADER
    arrays = {}
    for kind, start, end in zip(_KINDS, (_HEADER, *ends[:-1]), ends, strict=True):
        arrays[kind] = buffer[start:end].view(np.uint8 if kind == RECORDS else kind)
    return arrays_to_groups(arrays)[0]
