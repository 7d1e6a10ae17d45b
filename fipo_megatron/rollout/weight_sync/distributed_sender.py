"""Sends the actor's weights to SGLang servers by broadcast, with NCCL or gloo."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.bucket_sender import BucketSender, flatten
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights


class DistributedSender(BucketSender):
    """A :class:`.sender_protocol.WeightSender` by broadcast.

    The sender of each stage and all ranks of all servers form a group.

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
        for stage in range(actor.stages):
            with actor.together(f"connecting stage {stage} to the servers"):
                if stage == actor.stage and actor.sends:
                    self._connect(ranks_per_server, address, backend, timeout)

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
        for call in calls:
            call.result()

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
        for part in parts:
            self._group.broadcast(part, 0).wait()
        for call in calls:
            call.result()

    def close(self) -> None:
        """Destroys the group and closes the connections; a collective of the ranks that send and the servers."""
        if self._group is not None:
            with contextlib.suppress(EngineError):  # a server may have died since
                self._servers.all("/destroy_weights_update_group", {"group_name": self._name})
            dist.destroy_process_group(self._group)
            self._group = None
        super().close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _join_group(backend: str, address: str, port: int, world: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """Forms a process group of this process, its rank 0, and processes of another job, with a store of its own.

    SGLang forms its side with torch's ``_new_process_group_helper`` under the prefix ``name``; both sides must agree.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    store = dist.TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    group: dist.ProcessGroup
    with _default_group_unbound():
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            Backend(backend),
            PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]  # a NewType of str in some versions of torch
            timeout=timeout,
        )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
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
