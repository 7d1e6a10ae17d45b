"""One rank of a world of any size in a single process: process groups that do nothing, tensors without memory.

torch has both: the backend ``fake`` returns from every collective at once, and under FakeTensorMode operators compute
shapes and dtypes only. Megatron-Core then runs as it is, but for the few places listed in :func:`install`, where it
needs values that other ranks or the device would have given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fipo_megatron.actor.launch import Launch
from fipo_megatron.actor.update_metrics import UpdateMetrics

_METRICS = UpdateMetrics(
    loss=0.0,
    denominator=1,
    grad_norm=0.0,
    learning_rate=0.0,
    skipped="",
    statistics={},
    shifts=np.zeros((3, 1), np.int64),
)
_C10D = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers where the host reads a value from a tensor (``item``, ``tolist``), which fake tensors do not have.

    The answers are False, 0 and 1.0: no optimizer step is skipped, nothing is divided by zero.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, unless it reads a value."""
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0
        return func(*args, **kwargs or {})


def start_process_group(launch: Launch, timeout: timedelta, device: torch.device) -> None:
    """Creates a default group of the whole world whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=launch.rank, world_size=launch.world_size, timeout=timeout)


def environment(rank: int, world_size: int) -> dict[str, str]:
    """Returns the environment of a launcher for a rank of the fake world."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Opens a block in which tensors have no memory, and reads of their values are answered by :class:`HostReads`."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads():  # type: ignore[no-untyped-call]
        yield


def install() -> None:
    """Adapts torch and Megatron-Core in this process, which must train nothing afterwards.

    - Every further process group has the backend ``fake``, too, also where Megatron asks for gloo.
    - Collectives of objects return this rank's own object for every rank; the metrics that the last pipeline stage
      sends are made up.
    - The random states of Megatron's tracker are not exchanged: it compares them by value.
    - Coalesced collectives exist for fake tensors; torch has only the others (``distributed/_meta_registrations.py``).
    - Megatron's norm of the gradients, which reads values of tensors on its way, is 0.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (dist, "new_group", functools.partial(_fake_group, dist.new_group)),
        (dist, "all_gather_object", _echo),
        (dist, "broadcast_object_list", _receive),
        (CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext()),
        (clip_grads, "l2_norm_impl", lambda *args: (torch.zeros(1), None)),
        (FakeTensor, "numpy", lambda self: np.zeros(tuple(self.shape))),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    for name in ("allreduce", "allgather_into_tensor", "reduce_scatter_tensor"):
        _C10D.impl(f"{name}_coalesced_", lambda *args: FakeWork().boxed(), "Meta")  # type: ignore[no-untyped-call]


def _fake_group(new_group: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})


def _echo(found: list[Any], mine: Any, group: Any = None) -> None:
    found[:] = [mine] * len(found)


def _receive(objects: list[Any], *args: Any, **kwargs: Any) -> None:
    objects[:] = [_METRICS if found is None else found for found in objects]


def balance_experts(chunks: Iterable[torch.nn.Module]) -> None:
    """Lets every expert of the chunks get the same number of tokens: where they go is a value of the router.

    Megatron's dispatcher has a path with a fixed number of tokens per expert, for experts with a capacity.
    """
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(dispatcher := getattr(module, "token_dispatcher", None), MoEAlltoAllTokenDispatcher):
            dispatcher.drop_and_pad, dispatcher.moe_expert_capacity_factor = True, 1.0
        if isinstance(module, SequentialMLP):
            module.forward = functools.partial(_equal_parts, module.forward, module.num_local_experts)


def _equal_parts(forward: Callable[..., Any], experts: int, rows: Tensor, counts: Any, probs: Tensor) -> Any:
    counts = SimpleNamespace(tolist=lambda: [len(rows) // experts] * experts)
    return forward(rows, counts, probs)
