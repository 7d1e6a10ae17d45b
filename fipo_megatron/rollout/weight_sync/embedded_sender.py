"""Sends the actor's weights to embedded engines in processes of this job."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights


class EmbeddedSender:
    """A :class:`.sender_protocol.WeightSender` in memory; with several pipeline stages, through a directory.

    Args:
        actor: The actor's weights.
        engine: Engine of this rank, or None.
        leaders: Ranks with an engine.
        directory: Directory that all ranks see; used with several stages only.
    """

    def __init__(
        self, actor: ActorWeights, engine: EmbeddedEngine | None, leaders: Sequence[int], directory: Path
    ) -> None:
        self._actor, self._engine, self._leaders, self._directory = actor, engine, tuple(leaders), directory

    def send(self, version: int) -> None:
        """Copies all weights into the engines; see :meth:`.sender_protocol.WeightSender.send`."""
        with self._actor.together("updating the embedded engine"):
            if self._actor.stages == 1:
                self._update(self._streamed(), version)
        if self._actor.stages == 1:
            return
        target = self._directory / f"version-{version}"
        with self._actor.together("removing weights of that version"):
            if self._actor.leads:
                shutil.rmtree(target, ignore_errors=True)
        self._actor.save(target)
        with self._actor.together("updating the embedded engine"):
            if self._engine is not None:
                self._update(_read(target), version)
        with self._actor.together("removing weights that were sent"):
            if self._actor.leads:
                shutil.rmtree(target)

    def _streamed(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self._actor.stream(self._leaders):
            yield from ((name, tensor) for name, tensor in bucket if tensor is not None)

    def _update(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Updates the engine; consumes all tensors without one, too, because the stream contains collectives."""
        if self._engine is not None:
            self._engine.update_weights(tensors, version)
        for _ in tensors:
            pass

    def close(self) -> None:
        """Does nothing: there are no connections."""

    def abort(self) -> None:
        """Does nothing: there are no connections."""


def _read(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        yield from load_file(path).items()
