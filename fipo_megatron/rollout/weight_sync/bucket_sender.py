"""The common part of senders that send one bucket of tensors after the other to SGLang servers.

The first rank of each pipeline stage sends the tensors of its stage, stage after stage. Two broadcasts at the same time
could reach two servers in different orders, and both would wait for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fipo_megatron.observe import progress
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights

_SETTLE_SECONDS = 30.0
"""Seconds to wait for servers that are asked to give something up; a server that hangs does not answer."""


class BucketSender:
    """Opens an update on the servers, sends stage after stage, and sets the version last.

    Args:
        actor: The actor's weights.
        servers: The servers; closed with the sender.
    """

    def __init__(self, actor: ActorWeights, servers: BlockingControlClient) -> None:
        self._actor, self._servers = actor, servers

    def send(self, version: int) -> None:
        """Sends all buckets of all stages; see :meth:`.sender_protocol.WeightSender.send`."""
        actor = self._actor
        try:
            with actor.together("beginning an update of the weights"):
                if actor.leads:
                    self._servers.all("/begin_weight_update")
            for stage in range(actor.stages):
                with actor.together(f"sending the weights of stage {stage}"):
                    if stage == actor.stage:
                        self._send_stage()
        except Exception:
            self._give_up()
            raise
        with actor.together("ending the update of the weights"):
            if actor.leads:
                self._servers.all("/end_weight_update")
                self._servers.all("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def _send_stage(self) -> None:
        """Consumes the whole stream even if sending fails: other ranks of the stage take part in its collectives."""
        failed: Exception | None = None
        for bucket in self._actor.stream(self._actor.senders):
            tensors = [(name, tensor) for name, tensor in bucket if tensor is not None]
            if self._actor.sends and tensors and failed is None:
                try:
                    self._send_bucket(tensors)
                    progress.sign()
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed

    def _send_bucket(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        raise NotImplementedError

    def _give_up(self) -> None:
        """Ends a failed update on the servers that answer: a server allows one update at a time."""
        if self._actor.leads:
            settle(self._servers.begin("/end_weight_update", {url: {} for url in self._servers.urls}))

    def close(self) -> None:
        """Closes the connections to the servers."""
        self._servers.close()

    def abort(self) -> None:
        """Closes the connections to servers of which some are lost; waits for none of them for long."""
        self._servers.close()


def settle(calls: Sequence[Future[Any]], seconds: float = _SETTLE_SECONDS) -> list[BaseException]:
    """Waits until calls are over, but no longer than the given seconds.

    Returns:
        The errors of the calls that have failed.
    """
    done, _ = wait(calls, seconds)
    return [error for call in done if not call.cancelled() and (error := call.exception()) is not None]


def results(calls: Sequence[Future[Any]]) -> None:
    """Waits until all calls have succeeded, or one has failed: the others may then never return.

    Raises:
        EngineError: a call failed.
    """
    done, _ = wait(calls, return_when=FIRST_EXCEPTION)
    for call in done:
        call.result()


def flatten(tensors: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, list[SimpleNamespace]]:
    """Concatenates the bytes of tensors.

    Returns:
        ``[bytes]`` uint8, and the place of each tensor in it, with the fields of SGLang's ``FlattenedTensorMetadata``.
    """
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
