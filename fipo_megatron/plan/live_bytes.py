"""Counts the bytes of live tensors while a block runs, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_NO_BACKWARD = -1
_fused_depth = 0


@contextmanager
def fused() -> Iterator[None]:
    """Opens a block whose intermediate tensors do not count for the peak: a kernel of the GPU computes it at once."""
    global _fused_depth
    _fused_depth += 1
    try:
        yield
    finally:
        _fused_depth -= 1


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators allocate in its block and that are still referenced.

    Memory that an operator allocates and frees within itself is not seen: on CUDA, workspaces of kernels. Sizes are
    those of the storages, without the rounding of an allocator.

    Attributes:
        live: Bytes of live storages that were allocated in the block.
        peak: Largest value of :attr:`live` so far.
        held: Largest value of :attr:`live` at the start of a backward pass so far: what forward passes keep.

    Args:
        known: Tensors whose storages are not counted, such as parameters that operators of the block write to.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.held = 0
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known = {id(storage): storage for storage in [tensor.untyped_storage() for tensor in known]}
        self._task = _NO_BACKWARD

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts the storages of its outputs."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._task == _NO_BACKWARD:
                self.held = max(self.held, self.live)
            self._task = task
        out = func(*args, **kwargs or {})
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        if not _fused_depth:
            self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._references or key in self._known:
            return
        size = storage.nbytes()
        # torch keeps the Python object of a storage as long as the storage itself.
        self._references[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size

    def _free(self, key: int, size: int) -> None:
        del self._references[key]
        self.live -= size
