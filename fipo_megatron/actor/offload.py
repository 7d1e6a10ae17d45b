"""Frees the memory of tensors between the phases of a step and restores it.

Megatron's parameters and gradients are views into a few large buffers, and optimizer state may alias parameters.
Therefore storages are moved, each once, and all views remain valid.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Offloaded:
    """A set of storages that can be freed and restored.

    Args:
        tensors: Views into the storages; several may share one.
        keep: Whether the content is copied to the host and restored; else storages are restored as zeros.
    """

    def __init__(self, tensors: Iterable[Tensor], keep: bool) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self._storages.setdefault(storage.data_ptr(), (storage, storage.nbytes()))
        self._keep = keep
        self._copies: list[Tensor] = []
        self.is_offloaded = False

    @property
    def num_bytes(self) -> int:
        """Number of bytes that :meth:`free` frees."""
        return sum(size for _, size in self._storages.values())

    def free(self) -> None:
        """Frees the storages; their tensors must not be used until :meth:`restore`. Does nothing if they are freed."""
        if self.is_offloaded:
            return
        for storage, size in self._storages.values():
            if self._keep:
                copy = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes_of(storage))
                self._copies.append(copy)
            storage.resize_(0)
        self.is_offloaded = True

    def restore(self) -> None:
        """Allocates the storages again, with their content or zeros. Does nothing if they are not freed."""
        if not self.is_offloaded:
            return
        for index, (storage, size) in enumerate(self._storages.values()):
            storage.resize_(size)
            if self._keep:
                _bytes_of(storage).copy_(self._copies[index])
            else:
                _bytes_of(storage).zero_()
        self._copies.clear()
        self.is_offloaded = False


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
