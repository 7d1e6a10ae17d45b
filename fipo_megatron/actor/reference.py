"""The reference policy of the KL term: a copy of the parameters on the host that is loaded for its log-prob pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferencePolicy:
    """A copy of a model's parameters on the host.

    Args:
        parameters: Parameters of this rank.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._weights = _host_copies(parameters)

    @contextmanager
    def loaded_into(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Replaces the parameters' values by those of the reference within the block, without recording gradients.

        Args:
            parameters: Parameters of the same model, in the same order.
        """
        current = _host_copies(parameters)
        with torch.no_grad():
            _copy_all(self._weights, parameters)
            try:
                yield
            finally:
                _copy_all(current, parameters)


def _host_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
