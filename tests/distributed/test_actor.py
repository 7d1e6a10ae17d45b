"""Actor behaviour that needs several ranks, on two gloo ranks."""

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
def test_skips_and_fillers_on_two_ranks(references):
    assert "CP2" in on_ranks("tests.distributed.actor_worker", 2, references=references)
