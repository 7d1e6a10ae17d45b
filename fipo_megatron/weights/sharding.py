"""The number of parameters that each rank of a layout holds, from names and shapes alone, on any machine."""

from __future__ import annotations

from collections.abc import Iterator

from fipo_megatron.config import ParallelConfig
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.placement import ParameterPlacement, even_chunks


def rank_placements(
    architecture: Architecture, parallel: ParallelConfig, vocab_multiple: int = 1
) -> Iterator[ParameterPlacement]:
    """Yields the placements of the ranks whose parameters may differ, stage by stage.

    Args:
        architecture: Architecture of the model.
        parallel: Layout; layers are split evenly.
        vocab_multiple: The vocabulary is padded to a multiple of this times ``tensor_parallel``.

    Raises:
        ValueError: the layers cannot be split evenly.
    """
    tensor, expert, expert_tensor = parallel.tensor_parallel, parallel.expert_parallel, parallel.expert_tensor_size
    for stage in range(parallel.pipeline_parallel):
        chunks = even_chunks(architecture.layers, stage, parallel.pipeline_parallel, parallel.virtual_pipeline)
        for rank in range(max(tensor, expert * expert_tensor)):
            yield ParameterPlacement(
                chunks,
                architecture.padded_vocab(vocab_multiple * tensor),
                rank % tensor,
                tensor,
                rank // expert_tensor % expert,
                expert,
                rank % expert_tensor,
                expert_tensor,
            )


def local_parameter_counts(architecture: Architecture, parallel: ParallelConfig, vocab_multiple: int = 1) -> list[int]:
    """Returns the number of elements that each rank of :func:`rank_placements` holds, padding and copies included.

    Raises:
        ValueError: a parameter cannot be sharded as the layout says.
    """
    placements = rank_placements(architecture, parallel, vocab_multiple)
    return [tables.local_parameter_count(architecture, placement) for placement in placements]
