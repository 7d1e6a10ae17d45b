"""Attention over real gloo ranks: equal to the simulation, with three collectives, one of them in forward."""

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_a_process_group(ranks):
    on_ranks("tests.distributed.attention_worker", ranks)
