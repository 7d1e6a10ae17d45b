"""Vocabulary-parallel log-probs on real ranks equal one rank's, gradients included."""

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
def test_tensor_parallel_equals_one_rank():
    """Runs all layouts in one job."""
    printed = on_ranks("tests.distributed.log_probs_worker", 4)
    assert "tensor parallel 2: 6 cases" in printed
    assert "tensor parallel 4: 6 cases" in printed
