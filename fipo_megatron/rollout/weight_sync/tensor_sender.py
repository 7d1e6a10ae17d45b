"""Sends the actor's weights to SGLang servers in the bodies of requests."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence

from torch import Tensor

from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.bucket_sender import BucketSender, flatten
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights


class TensorSender(BucketSender):
    """A :class:`.sender_protocol.WeightSender` through host memory, for servers on this machine and small models.

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
