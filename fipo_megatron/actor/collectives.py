"""Error propagation between ranks, so that no rank waits forever in a collective that another rank has left."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Raised on a rank because other ranks have failed; the message holds their hosts and errors."""


@contextmanager
def raise_on_all_ranks(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raises on all ranks if the block raises on any. A collective.

    Args:
        what: Name of the operation, for the message.
        group: Process group of all ranks; None: the default group. A thread beside the main thread needs its own.

    Raises:
        Exception: the error of the block, on the ranks where it was raised.
        OtherRankError: the errors of the other ranks, on all other ranks.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found: list[str | None] = [None] * dist.get_world_size(group)
    text = None if own is None else f"on {socket.gethostname()}: {type(own).__name__}: {own}"
    dist.all_gather_object(found, text, group=group)
    if own is not None:
        raise own
    if failed := [f"rank {rank} {text}" for rank, text in enumerate(found) if text]:
        raise OtherRankError(f"{what} failed on other ranks:\n" + "\n".join(failed))


def broadcast_from_first_rank(value: T, device: torch.device) -> T:
    """Returns the first rank's value on every rank. A collective of all ranks.

    Args:
        value: Any object that can be pickled; ignored on other ranks.
        device: Device of this rank, for the message.
    """
    message = [value]
    dist.broadcast_object_list(message, src=0, device=device)
    return message[0]
