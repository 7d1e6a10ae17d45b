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
        tensor_parallel: Tensor-parallel size of every server. Each rank takes its part of the whole tensors.
    """

    def __init__(self, actor: ActorWeights, servers: BlockingControlClient, tensor_parallel: int = 1) -> None:
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
