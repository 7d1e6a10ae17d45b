"""Where the parts of a model can be: what a rank holds, what parameters are called there, what a part is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """How Megatron-Core names parameters, which depends on the layers that it is built from.

    Attributes:
        fused_norms: Transformer Engine's layers.
        grouped_experts: One module holds all experts.
    """

    fused_norms: bool = False
    grouped_experts: bool = False

    @classmethod
    def from_parameter_names(cls, names: Sequence[str]) -> Naming:
        """Found from the names of some layer's parameters."""
        return cls(
            any(name.endswith(".layer_norm_weight") for name in names),
            any(re.search(r"\.experts\.linear_fc1\.weight\d+$", name) for name in names),
        )


PLAIN = Naming()
"""Megatron-Core's own layers, experts one by one."""


@dataclass(frozen=True)
class Chunk:
    """A run of layers in one model object of Megatron.

    Attributes:
        layers: Their numbers in the whole model.
        first: The embedding is here.
        last: The final norm and the output weight are here.
    """

    layers: range
    first: bool
    last: bool


def even_chunks(layers: int, stage: int, stages: int, virtual: int = 1) -> tuple[Chunk, ...]:
    """The chunks of a pipeline stage where layers are split evenly: chunk v of stage s is run number v · stages + s.

    Raises:
        ValueError: they cannot be.
    """
    if layers % (stages * virtual):
        raise ValueError(f"{layers} layers cannot be split evenly over {stages} stages with {virtual} chunks each")
    size = layers // (stages * virtual)
    runs = [v * stages + stage for v in range(virtual)]
    return tuple(Chunk(range(r * size, (r + 1) * size), r == 0, r == stages * virtual - 1) for r in runs)


@dataclass(frozen=True)
class ParameterPlacement:
    """What a rank holds a part of.

    Attributes:
        chunks: Its chunks, in the order of Megatron's list of models.
        padded_vocab: Rows of the embedding over all ranks.
        tensor_rank: Its part of matrices, of ``tensor_size``.
        tensor_size: Ranks that share matrices.
        expert_rank: Its part of the experts of a layer, of ``expert_size``.
        expert_size: Ranks that share the experts of a layer.
        expert_tensor_rank: Its part of an expert's matrices, of ``expert_tensor_size``.
        expert_tensor_size: Ranks that share an expert's matrices.
    """

    chunks: tuple[Chunk, ...]
    padded_vocab: int
    tensor_rank: int = 0
    tensor_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1


@dataclass(frozen=True)
class Piece:
    """A slice of a tensor, along one axis, and where it goes in a rank's part of the parameter, along the same.

    Attributes:
        tensor: Its name on disk.
        axis: 0 or 1.
        start: First row or column in the tensor.
        stop: The one after the last.
        offset: Where ``start`` is in the part.
    """

    tensor: str
    axis: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Rows or columns."""
        return self.stop - self.start
