"""The tensors that a rank holds between steps: parameters, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def gradient_buffers(wrapped: Iterable[DistributedDataParallel]) -> list[Tensor]:
    """Returns the buffers of which every parameter's gradient is a view; padding is included."""
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [buffer.grad_data for buffer in buffers]


def optimizer_state(optimizer: MegatronOptimizer, parameters: Iterable[torch.nn.Parameter]) -> Iterator[Tensor]:
    """Yields main parameters and moments that do not share storage with the model's parameters.

    The moments exist from the first optimizer step on.
    """
    model = {_storage_id(parameter) for parameter in parameters}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = each.optimizer
        tensors = [parameter.data for group in inner.param_groups for parameter in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        yield from (tensor for tensor in tensors if _storage_id(tensor) not in model)


def _storage_id(tensor: Tensor) -> int:
    """Returns a number that tensors share if they share their storage; fake tensors have it, too, but no address."""
    number: int = tensor.untyped_storage()._cdata
    return number
