"""Checks that the parameters of a model are finite: a model that is not can neither be trained nor used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fipo_megatron.actor.hf_weights import local_parameters
from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError


@torch.no_grad()
def check_finite(
    chunks: Sequence[HiddenStateGPTModel], architecture: Architecture, layout: RankLayout, what: str
) -> None:
    """Checks the parameters of all ranks. A collective of all ranks.

    Args:
        chunks: This rank's chunks.
        architecture: Architecture of the model.
        layout: Layout of this rank.
        what: Name of the model, for the message.

    Raises:
        WeightsError: Values are NaN or infinite; on all ranks.
    """
    mine = [local.name for local, values in local_parameters(chunks, architecture, layout) if not _is_finite(values)]
    everyone: list[list[str]] = [[]] * layout.world_size
    dist.all_gather_object(everyone, mine)
    if found := [name for names in everyone for name in names]:
        raise WeightsError(f"{what}: {len(found)} parameters hold NaN or infinity, the first is {found[0]}")


def _is_finite(values: torch.Tensor) -> bool:
    """Returns whether all values are finite; their norm is computed without a copy of the tensor."""
    return bool(torch.linalg.vector_norm(values, torch.inf).isfinite())
