"""The actor's weights into engines of this job's own processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.weight_sync.senders import ActorWeights


class EmbeddedSender:
    """A :class:`.senders.WeightSender`: from process to process; with several stages, through a directory.

    Args:
        actor: See :class:`.senders.ActorWeights`.
        engine: Of this rank; None where it has none.
        leaders: Ranks with an engine.
        directory: All ranks see it; only used with several stages.
    """

    def __init__(
        self, actor: ActorWeights, engine: EmbeddedEngine | None, leaders: Sequence[int], directory: Path
    ) -> None:
        self._actor, self._engine, self._leaders, self._directory = actor, engine, tuple(leaders), directory

    def send(self, version: int) -> None:
        """See :class:`.senders.WeightSender`."""
        with self._actor.together("updating the embedded engine"):
            if self._actor.stages == 1:
                self._take(self._streamed(), version)
        if self._actor.stages == 1:
            return
        target = self._directory / f"version-{version}"
        with self._actor.together("removing weights of that version"):
            if self._actor.leads:
                shutil.rmtree(target, ignore_errors=True)
        self._actor.save(target)
        with self._actor.together("updating the embedded engine"):
            if self._engine is not None:
                self._take(_read(target), version)
        with self._actor.together("removing weights that were sent"):
            if self._actor.leads:
                shutil.rmtree(target)

    def _streamed(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self._actor.stream(self._leaders):
            yield from ((name, tensor) for name, tensor in bucket if tensor is not None)

    def _take(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """All of them, also where there is no engine: other ranks are in the stream's collectives."""
        if self._engine is not None:
            self._engine.update_weights(tensors, version)
        for _ in tensors:
            pass

    def close(self) -> None:
        """See :class:`.senders.WeightSender`: nothing."""


def _read(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        yield from load_file(path).items()
