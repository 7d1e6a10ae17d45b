"""How much of a model every rank of a layout holds: names and shapes only, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.placement import Place, even_chunks


@dataclass(frozen=True)
class Split:
    """A way to spread weights over ranks.

    Attributes:
        tensor: Ranks that share every matrix.
        pipeline: Stages.
        virtual: Chunks of layers per stage.
        expert: Ranks that share the experts.
        expert_tensor: Ranks that share every expert's matrices.
        vocab_multiple: The vocabulary is padded to a multiple of this times ``tensor``.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    vocab_multiple: int = 1


def places(architecture: Architecture, split: Split) -> Iterator[Place]:
    """The ranks whose shares may differ, stage by stage.

    Raises:
        ValueError: the layers cannot be spread evenly.
    """
    per_stage = max(split.tensor, split.expert * split.expert_tensor)
    for stage in range(split.pipeline):
        chunks = even_chunks(architecture.layers, stage, split.pipeline, split.virtual)
        for rank in range(per_stage):
            yield Place(
                chunks,
                architecture.padded_vocab(split.vocab_multiple * split.tensor),
                rank % split.tensor,
                split.tensor,
                rank // split.expert_tensor % split.expert,
                split.expert,
                rank % split.expert_tensor,
                split.expert_tensor,
            )


def share_sizes(architecture: Architecture, split: Split) -> list[int]:
    """Elements that each of :func:`places` holds, with padding and copies.

    Raises:
        ValueError: a parameter cannot be cut as the split says.
    """
    return [tables.local_parameter_count(architecture, place) for place in places(architecture, split)]
