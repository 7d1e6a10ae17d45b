"""Sends the actor's weights to SGLang servers by broadcast, with NCCL or gloo."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.bucket_sender import BucketSender, flatten, results, settle
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights

_POLL_SECONDS = 0.5
_REFUSAL_SECONDS = 0.5
"""Seconds within which a server that has ended refuses a connection."""


class DistributedSender(BucketSender):
    """A :class:`.sender_protocol.WeightSender` by broadcast.

    The sender of each stage and all ranks of all servers form a group. The group is aborted as soon as a server fails:
    with NCCL the broadcast would otherwise stay on the stream, and everything behind it would wait, until the watchdog
    of torch ends this process.

    Args:
        actor: The actor's weights.
        servers: The servers; closed with the sender.
        ranks_per_server: Number of ranks of each server, in the order of ``servers.urls``.
        address: Address of this host, as the servers reach it.
        backend: ``nccl`` or ``gloo``.
        flattened: Whether a bucket is sent as one tensor.
        timeout: Limit for connecting a group, and for each broadcast.

    Raises:
        EngineError: a server refused to connect or cannot be reached.
    """

    def __init__(
        self,
        actor: ActorWeights,
        servers: BlockingControlClient,
        ranks_per_server: Sequence[int],
        *,
        address: str = "127.0.0.1",
        backend: str = "nccl",
        flattened: bool = True,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        super().__init__(actor, servers)
        # Unique, because the group of an earlier trainer may still exist on the servers.
        self._name = f"fipo_megatron_stage_{actor.stage}_{uuid.uuid4().hex}"
        self._flattened = flattened
        self._group: dist.ProcessGroup | None = None
        self._joined = False
        try:
            for stage in range(actor.stages):
                with actor.together(f"connecting stage {stage} to the servers"):
                    if stage == actor.stage and actor.sends:
                        self._connect(ranks_per_server, address, backend, timeout)
        except Exception:
            self._abort_group()
            raise

    def _connect(self, ranks: Sequence[int], address: str, backend: str, timeout: timedelta) -> None:
        world, port = 1 + sum(ranks), _free_port()
        offsets = [1 + sum(ranks[:i]) for i in range(len(ranks))]
        common = {"master_address": address, "master_port": port, "world_size": world, "backend": backend}
        calls = self._servers.begin(
            "/init_weights_update_group",
            {
                url: common | {"rank_offset": offset, "group_name": self._name}
                for url, offset in zip(self._servers.urls, offsets, strict=True)
            },
        )
        self._group = _join_group(backend, address, port, world, self._name, timeout)
        self._joined = True
        results(calls)

    def _send_bucket(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        assert self._group is not None
        payload = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": self._name,
            "load_format": "flattened_bucket" if self._flattened else None,
        }
        calls = self._servers.begin("/update_weights_from_distributed", dict.fromkeys(self._servers.urls, payload))
        parts = [flatten(tensors)[0]] if self._flattened else [tensor.contiguous() for _, tensor in tensors]
        try:
            _finish(calls, [self._group.broadcast(part, 0) for part in parts])
        except EngineError:
            self._abort_group()
            raise
        except RuntimeError as error:
            self._abort_group()
            refused = settle(calls, _REFUSAL_SECONDS)  # says more than a connection that was closed
            raise next(iter(refused), EngineError(f"the broadcast of weights has failed: {error}")) from error

    def _give_up(self) -> None:
        """Aborts the group of this stage, too: a server that failed may be missing in it."""
        self._abort_group()
        super()._give_up()

    def _abort_group(self) -> None:
        """Aborts the group without the servers; its broadcasts leave the stream."""
        if self._group is not None:
            group, self._group = self._group, None
            distributed_c10d._abort_process_group(group)

    def _begin_destroy(self) -> list[Future[Any]]:
        """Begins the servers' side of destroying the group; only the rank that has formed it."""
        if not self._joined:
            return []
        self._joined = False
        payload = {"group_name": self._name}
        return self._servers.begin("/destroy_weights_update_group", dict.fromkeys(self._servers.urls, payload))

    def close(self) -> None:
        """Destroys the group and closes the connections; a collective of the ranks that send and the servers.

        Destroying a group of NCCL is a collective, so both sides do it at the same time, unless a server has ended.
        """
        calls = self._begin_destroy()
        if settle(calls, _REFUSAL_SECONDS):
            self._abort_group()
        if self._group is not None:
            group, self._group = self._group, None
            dist.destroy_process_group(group)
        settle(calls)
        super().close()

    def abort(self) -> None:
        """Aborts the group and closes the connections; servers that are still there give up their side."""
        self._abort_group()
        settle(self._begin_destroy(), _REFUSAL_SECONDS)
        super().abort()


def _finish(calls: Sequence[Future[Any]], works: Sequence[dist.Work]) -> None:
    """Waits until all servers have answered that they have received the broadcasts, then for the broadcasts.

    The servers' answers come first. With NCCL, waiting for a broadcast lets only the stream wait, which shows no error.
    With gloo it blocks, and a server that has ended need not be noticed.

    Raises:
        EngineError: a server failed.
        RuntimeError: a broadcast failed.
    """
    pending = {*calls}
    while pending:
        done, pending = wait(pending, _POLL_SECONDS, return_when=FIRST_EXCEPTION)
        for call in done:
            call.result()
        for work in works:
            if work.is_completed():
                work.wait()  # raises the error of a broadcast that has failed
    for work in works:
        work.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _join_group(backend: str, address: str, port: int, world: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """Forms a process group of this process, its rank 0, and processes of another job, with a store of its own.

    SGLang forms its side with torch's ``_new_process_group_helper`` under the prefix ``name``; both sides must agree.
    """
    store = dist.TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    group: dist.ProcessGroup
    with _default_group_unbound():
        group, _ = distributed_c10d._new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]  # a NewType of str in some versions of torch
            timeout=timeout,
        )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


@contextlib.contextmanager
def _default_group_unbound() -> Iterator[None]:
    """Hides the device of the default group while another group is formed.

    With a bound device torch forms every further NCCL group by ``ncclCommSplit`` of the default group
    (``distributed_c10d._new_process_group_helper``, ``split_from``). A split is a collective of all ranks of the
    trainer, which take no part here, and cannot contain the servers.
    """
    default = dist.group.WORLD if dist.is_initialized() else None
    device = getattr(default, "bound_device_id", None)
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device
