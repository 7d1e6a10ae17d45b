"""The placement of parameters on a rank: its chunks and shards, their names and the slices of tensors in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """Megatron-Core's naming of parameters, which depends on the layers of the model.

    Attributes:
        fused_norms: Norms are part of the matrix that follows, as in Transformer Engine's layers.
        grouped_experts: One module holds all experts.
    """

    fused_norms: bool = False
    grouped_experts: bool = False

    @classmethod
    def from_parameter_names(cls, names: Sequence[str]) -> Naming:
        """Detects the naming from the parameter names of some layer."""
        return cls(
            any(name.endswith(".layer_norm_weight") for name in names),
            any(re.search(r"\.experts\.linear_fc1\.weight\d+$", name) for name in names),
        )


PLAIN = Naming()
"""Naming of Megatron-Core's own layers, with one module per expert."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers in one model chunk of Megatron.

    Attributes:
        layers: Indices in the whole model.
        first: The chunk holds the embedding.
        last: The chunk holds the final norm and the output weight.
    """

    layers: range
    first: bool
    last: bool


def even_chunks(layers: int, stage: int, stages: int, virtual: int = 1) -> tuple[Chunk, ...]:
    """Returns the chunks of a pipeline stage with an even split: chunk v of stage s has index v · stages + s.

    Args:
        layers: Number of layers of the model.
        stage: Pipeline stage.
        stages: Number of pipeline stages.
        virtual: Number of chunks per stage.

    Raises:
        ValueError: the layers cannot be split evenly.
    """
    if layers % (stages * virtual):
        raise ValueError(f"{layers} layers cannot be split evenly over {stages} stages with {virtual} chunks each")
    size = layers // (stages * virtual)
    runs = [v * stages + stage for v in range(virtual)]
    return tuple(Chunk(range(r * size, (r + 1) * size), r == 0, r == stages * virtual - 1) for r in runs)


@dataclass(frozen=True)
class ParameterPlacement:
    """The chunks and shards of parameters that a rank holds.

    Attributes:
        chunks: Chunks of this rank, in the order of Megatron's list of models.
        padded_vocab: Number of rows of the embedding over all ranks.
        tensor_rank: Tensor-parallel rank: its shard of every matrix.
        tensor_size: Tensor-parallel size.
        expert_rank: Expert-parallel rank: its part of the experts of a layer.
        expert_size: Expert-parallel size.
        expert_tensor_rank: Expert-tensor-parallel rank: its shard of every expert's matrices.
        expert_tensor_size: Expert-tensor-parallel size.
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
    """A slice of a tensor along one axis and its offset in a rank's shard of the parameter along the same axis.

    Attributes:
        tensor: Name of the tensor on disk.
        axis: Axis, 0 or 1.
        start: First row or column in the tensor.
        stop: End of the rows or columns, exclusive.
        offset: Offset of ``start`` in the shard.
    """

    tensor: str
    axis: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start
