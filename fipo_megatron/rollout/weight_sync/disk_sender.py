"""Sends the actor's weights to SGLang servers through a directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights


class DiskSender:
    """A :class:`.sender_protocol.WeightSender` through a directory that actor and servers see; removes older versions.

    Args:
        actor: The actor's weights.
        servers: The servers; closed with the sender.
        directory: Existing directory; each version is a directory in it.

    Attributes:
        latest: Directory of the version that was sent last, for a server that comes back later.
    """

    def __init__(self, actor: ActorWeights, servers: BlockingControlClient, directory: Path) -> None:
        self._actor, self._servers, self._directory = actor, servers, directory
        self.latest: Path | None = None

    def send(self, version: int) -> None:
        """Writes the weights and makes the servers load them; see :meth:`.sender_protocol.WeightSender.send`."""
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
        """Closes the connections to the servers."""
        self._servers.close()

    def abort(self) -> None:
        """Closes the connections: they are requests of their own."""
        self.close()
