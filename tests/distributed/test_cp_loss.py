"""The loss over real gloo ranks: equal to the simulation bit for bit, with one collective per micro-batch."""

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_over_a_process_group(ranks):
    on_ranks("tests.distributed.cp_loss_worker", ranks)
