"""Sends the actor's weights to SGLang servers: through a shared disk, in the request itself, or by broadcast.

Every actor rank calls :meth:`WeightSender.send` at the same time. The first rank of each pipeline stage sends what its
stage streams, stage after stage: two broadcasts at a time could reach two servers in different orders, and wait for
each other for ever. A server has the new version only after everything has arrived; where anything fails, every rank
raises, and the servers' weights are good for nothing until all are sent again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import shutil
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.responses import error_text

Bucket = Sequence[tuple[str, Tensor | None]]
"""Hugging Face names and whole tensors; None on ranks that do not send."""


@dataclass(frozen=True)
class ActorWeights:
    """What a sender has to know of the actor, on this rank.

    Attributes:
        stage: This rank's pipeline stage, of ``stages``.
        stages: How many there are.
        rank: Of all ranks of the actor.
        senders: The first rank of each stage.
        stream: Gives this stage's tensors in buckets, whole on ``on_ranks``; a collective of the stage's ranks.
        save: Writes a Hugging Face directory; a collective of all ranks.
        together: A block that raises on all ranks what it raised on any; a collective.
    """

    stage: int
    stages: int
    rank: int
    senders: tuple[int, ...]
    stream: Callable[[Collection[int]], Iterator[Bucket]]
    save: Callable[[Path], None]
    together: Callable[[str], AbstractContextManager[None]]

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def sends(self) -> bool:
        """Whether this rank sends what its stage has."""
        return self.rank in self.senders


class ServerControl:
    """Control calls to SGLang servers, from threads: the caller may be in a broadcast meanwhile.

    Args:
        urls: Of the servers.
        api_key: Sent as a bearer token.
        timeout: Seconds for one call.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None = None, timeout: float = 600.0) -> None:
        self.urls = tuple(urls)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self.urls)))

    def begin(self, path: str, payloads: Mapping[str, Mapping[str, Any]]) -> list[Future[dict[str, Any]]]:
        """Posts to each URL its payload; ``result()`` of what is returned waits."""
        return [self._pool.submit(self._post, url, path, payload) for url, payload in payloads.items()]

    def all(self, path: str, payload: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Posts to all servers and waits.

        Raises:
            EngineError: any of them failed; the message names server, path, status and what it said.
        """
        return [call.result() for call in self.begin(path, {url: payload or {} for url in self.urls})]

    def _post(self, url: str, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(url + path, json.dumps(payload).encode(), self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise EngineError(f"{url}{path}: HTTP status {error.code}: {error_text(error.read())}") from error
        except OSError as error:
            raise EngineError(f"{url}{path}: cannot be reached: {error}") from error
        found = json.loads(body) if body[:1] == b"{" else {}
        if found.get("success") is False:
            raise EngineError(f"{url}{path}: {found.get('message') or found}")
        return dict(found)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


class WeightSender(Protocol):
    """A way to send weights."""

    def send(self, version: int) -> None:
        """Sends all weights as this version; a collective of all actor ranks. The servers must be idle or paused.

        Raises:
            EngineError: a server refused, or cannot be reached; RuntimeError on ranks where all went well.
        """

    def close(self) -> None:
        """Takes down what connects actor and servers."""


class DiskSender:
    """Through a directory that actor and servers see; older ones are removed.

    Args:
        actor: See :class:`ActorWeights`.
        servers: To be told.
        directory: Exists; versions are directories in it.
    """

    def __init__(self, actor: ActorWeights, servers: ServerControl, directory: Path) -> None:
        self._actor, self._servers, self._directory = actor, servers, directory
        self.latest: Path | None = None
        """What was sent last: for a server that comes back later."""

    def send(self, version: int) -> None:
        """See :class:`WeightSender`."""
        target = self._directory / f"version-{version}"
        with self._actor.together("removing weights of that version"):
            if self._actor.leads:
                shutil.rmtree(target, ignore_errors=True)
        self._actor.save(target)
        self.latest = target
        with self._actor.together("sending weights"):
            if self._actor.leads:
                self._servers.all(
                    "/update_weights_from_disk", {"model_path": str(target), "weight_version": str(version)}
                )
                for old in self._directory.glob("version-*"):
                    if old != target:
                        shutil.rmtree(old)

    def close(self) -> None:
        """See :class:`WeightSender`: nothing."""


class _BucketSender:
    """What senders by bucket have in common: a session on the servers, stage after stage, the version last."""

    def __init__(self, actor: ActorWeights, servers: ServerControl) -> None:
        self._actor, self._servers = actor, servers

    def send(self, version: int) -> None:
        """See :class:`WeightSender`."""
        actor = self._actor
        with actor.together("beginning an update of the weights"):
            if actor.leads:
                self._servers.all("/begin_weight_update")
        try:
            for stage in range(actor.stages):
                with actor.together(f"sending the weights of stage {stage}"):
                    if stage == actor.stage:
                        self._send_stage()
        except Exception:
            if actor.leads:
                with contextlib.suppress(EngineError):
                    self._servers.all("/end_weight_update")  # a server allows one session at a time
            raise
        with actor.together("ending the update of the weights"):
            if actor.leads:
                self._servers.all("/end_weight_update")
                self._servers.all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def _send_stage(self) -> None:
        """Takes the whole stream even where sending failed: the stage's other ranks are in its collectives."""
        failed: Exception | None = None
        for bucket in self._actor.stream(self._actor.senders):
            tensors = [(name, tensor) for name, tensor in bucket if tensor is not None]
            if self._actor.sends and tensors and failed is None:
                try:
                    self._send_bucket(tensors)
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed

    def _send_bucket(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """See :class:`WeightSender`: nothing."""


class TensorSender(_BucketSender):
    """In the request itself, through host memory: for servers on this machine and small models.

    Args:
        actor: See :class:`ActorWeights`.
        servers: Of the same ``tensor_parallel`` each.
        tensor_parallel: Ranks of each server; each takes its part of the whole tensors.
    """

    def __init__(self, actor: ActorWeights, servers: ServerControl, tensor_parallel: int = 1) -> None:
        super().__init__(actor, servers)
        self._tensor_parallel = tensor_parallel

    def _send_bucket(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        flat, metadata = flatten(tensors)
        content = base64.b64encode(pickle.dumps({"flattened_tensor": flat.cpu(), "metadata": metadata})).decode()
        payload = {
            "serialized_named_tensors": [content] * self._tensor_parallel,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        self._servers.all("/update_weights_from_tensor", payload)


class DistributedSender(_BucketSender):
    """By broadcast, NCCL or gloo: every stage's sender and all ranks of all servers are one group.

    Args:
        actor: See :class:`ActorWeights`.
        servers: To send to.
        ranks_per_server: Ranks of each server, in the order of ``servers.urls``.
        address: This host, as the servers reach it.
        backend: ``nccl`` or ``gloo``.
        flattened: Send a bucket as one tensor.
        timeout: For the groups to come up, and for each broadcast.
    """

    def __init__(
        self,
        actor: ActorWeights,
        servers: ServerControl,
        ranks_per_server: Sequence[int],
        *,
        address: str = "127.0.0.1",
        backend: str = "nccl",
        flattened: bool = True,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        super().__init__(actor, servers)
        self._name = f"fipo_megatron_stage_{actor.stage}_{uuid.uuid4().hex}"  # an earlier trainer's may still be there
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
        self._group = _group_beside(backend, address, port, world, self._name, timeout)
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
        """See :class:`WeightSender`; a collective of the ranks that send and the servers."""
        if self._group is not None:
            with contextlib.suppress(EngineError):  # one that has died since
                self._servers.all("/destroy_weights_update_group", {"group_name": self._name})
            dist.destroy_process_group(self._group)
            self._group = None


def flatten(tensors: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, list[SimpleNamespace]]:
    """One tensor of bytes, and what is where in it, under the names of SGLang's ``FlattenedTensorMetadata``."""
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in tensors]
    ends = np.cumsum([part.numel() for part in parts]).tolist()
    metadata = [
        SimpleNamespace(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            start_idx=end - part.numel(),
            end_idx=end,
            numel=part.numel(),
        )
        for (name, tensor), part, end in zip(tensors, parts, ends, strict=True)
    ]
    return torch.cat(parts), metadata


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _group_beside(
    backend: str, address: str, port: int, world: int, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """A process group of this process, its rank 0, and processes of another job, on a store of its own.

    SGLang makes its side with torch's ``_new_process_group_helper`` under the prefix ``name``; ours has to agree.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    store = dist.TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        world, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group
