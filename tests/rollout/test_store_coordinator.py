"""Errors that ranks tell each other through the store."""

import asyncio

import pytest
import torch.distributed as dist

from fipo_megatron.rollout.engine import EngineError, PermanentEngineError, RequestError
from fipo_megatron.rollout.store_coordinator import StoreCoordinator


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermanentEngineError("log-probs"), PermanentEngineError),
        (RequestError("too long"), PermanentEngineError),
        (EngineError("no server"), EngineError),
        (OSError("disk"), EngineError),
    ],
)
def test_every_rank_learns_whether_an_error_would_occur_again(error, kind):
    async def go():
        store = dist.HashStore()
        first, second = (StoreCoordinator(store, rank, (0, 1), 2) for rank in range(2))
        return await asyncio.gather(first.gather({}), second.gather({}, error), return_exceptions=True)

    other, own = asyncio.run(go())
    assert type(own) is type(other) is kind
    assert str(other) == f"rank 1: {type(error).__name__}: {error}"
    assert str(error) in str(own)


def test_ranks_count_the_same_claims_although_one_still_claims():
    """Rank 0 fails and closes; rank 1 claims once more before it hears of it."""
    store = dist.HashStore()
    first, second = (StoreCoordinator(store, rank, (0, 1), 2) for rank in range(2))
    first.open_claims()
    second.open_claims()
    assert [first.claim(), second.claim(), second.claim()] == [0, 1, 2]
    assert first.close_claims() == 3
    assert second.claim() >= 1 << 40
    assert second.close_claims() == 3
