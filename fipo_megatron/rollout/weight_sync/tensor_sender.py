"""Sends the actor's weights to SGLang servers in the bodies of requests."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from fipo_megatron.config import Config
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.bucket_sender import BucketSender, flatten
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

MAX_REQUEST_BYTES = 2e9
"""Most bytes of requests to a server per update: each rank of the server gets all weights, as base64 in JSON."""


def size_problem(config: Config, architecture: Architecture) -> str | None:
    """Returns why the model is too large to be sent in requests, with the numbers; None if it is not."""
    rollout = config.rollout
    if rollout.engine != "sglang" or rollout.servers.sync != "tensor":
        return None
    ranks = int(rollout.sglang.get("tp_size", 1))
    weights = tables.parameter_count(architecture) * getattr(torch, config.actor.dtype).itemsize
    requests = weights * ranks * 4 / 3
    if requests <= MAX_REQUEST_BYTES:
        return None
    other = "disk" if rollout.servers.colocated else "disk or distributed"
    return (
        f"rollout.servers.sync = tensor: must be {other} for this model; {weights / 1e9:.3g} GB of weights for each of "
        f"rollout.sglang.tp_size = {ranks} ranks are {requests / 1e9:.3g} GB of base64 in requests to each server at "
        f"every update, and tensor allows {MAX_REQUEST_BYTES / 1e9:g} GB"
    )


class TensorSender(BucketSender):
    """A :class:`.sender_protocol.WeightSender` through host memory, for servers on this machine and small models.

    Handles of CUDA memory (CUDA IPC) instead of the bytes are not sent: see docs/gpu.md.

    Args:
        actor: The actor's weights.
        servers: The servers; closed with the sender.
        ranks_per_server: Number of ranks of each server, in the order of ``servers.urls``; each rank takes its part of
            the whole tensors.
    """

    def __init__(self, actor: ActorWeights, servers: BlockingControlClient, ranks_per_server: Sequence[int]) -> None:
        super().__init__(actor, servers)
        self._ranks = dict(zip(servers.urls, ranks_per_server, strict=True))

    def _send_bucket(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        flat, metadata = flatten(tensors)
        content = base64.b64encode(pickle.dumps({"flattened_tensor": flat.cpu(), "metadata": metadata})).decode()
        common = {"load_format": "flattened_bucket", "flush_cache": True}
        calls = self._servers.begin(
            "/update_weights_from_tensor",
            {url: common | {"serialized_named_tensors": [content] * ranks} for url, ranks in self._ranks.items()},
        )
        for call in calls:
            call.result()
