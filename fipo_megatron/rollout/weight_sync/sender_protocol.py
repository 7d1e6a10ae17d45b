"""The protocol of weight senders, and the actor's side of a send.

Every actor rank calls :meth:`WeightSender.send` at the same time. An engine has the new version only after everything
has arrived. If a send fails, every rank raises, and the engine must not be used until all weights are sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

Bucket = Sequence[tuple[str, Tensor | None]]
"""Hugging Face names and whole tensors; None instead of a tensor on ranks that do not send."""


@dataclass(frozen=True)
class ActorWeights:
    """Access to the actor's weights on this rank.

    Attributes:
        stage: Pipeline stage of this rank.
        stages: Number of pipeline stages.
        rank: Rank among all ranks of the actor.
        senders: First rank of each stage; it sends the tensors of its stage.
        stream: Yields the tensors of this stage in buckets, whole on the given ranks; a collective of the stage.
        save: Writes a Hugging Face directory; a collective of all ranks.
        together: A block that raises on all ranks if it raised on any; a collective of all ranks. Its argument names
            what the block does.
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
        """Whether this rank makes the calls that are made once."""
        return self.rank == 0

    @property
    def sends(self) -> bool:
        """Whether this rank sends the tensors of its stage."""
        return self.rank in self.senders


class WeightSender(Protocol):
    """Sends the actor's weights to the rollout engine."""

    def send(self, version: int) -> None:
        """Sends all weights as this version; a collective of all actor ranks. The engine must be idle or paused.

        Raises:
            EngineError: a server refused the weights or cannot be reached.
            RuntimeError: another rank failed.
        """

    def close(self) -> None:
        """Closes the connections between actor and engine."""

    def abort(self) -> None:
        """Closes the connections to servers of which some are lost; waits for none of them for long."""
