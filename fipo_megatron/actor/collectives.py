"""What goes wrong on one rank goes wrong on all: none waits for ever in a collective that another has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raises on every rank what the block raised on any: its own error there, RuntimeError elsewhere. A collective.

    Args:
        what: Is being done.
        group: Of all ranks; None: the default one. A thread beside the main one needs its own.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, None if own is None else f"{type(own).__name__}: {own}", group=group)
    if own is not None:
        raise own
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]:
        raise RuntimeError(f"{what} failed on other ranks:\n" + "\n".join(failed))


def broadcast_from_first_rank(value: T, device: torch.device) -> T:
    """Returns the first rank's value on every rank. A collective of all ranks.

    Args:
        value: Any object that can be pickled; ignored on other ranks.
        device: Device of this rank, for the message.
    """
    message = [value]
    dist.broadcast_object_list(message, src=0, device=device)
    return message[0]
