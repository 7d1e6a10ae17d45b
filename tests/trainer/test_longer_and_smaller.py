"""A step with fewer groups is reported, and an extended run is no fault."""

import pytest

from tests.runs import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_a_smaller_step_is_shown_and_a_longer_run_is_no_fault(data, tmp_path):
    smaller = ["rollout.on_exhausted=smaller", "rollout.max_generation_batches=1"]
    said = train(data, tmp_path / "run", *smaller, "run.steps=1")
    (row,) = metrics(tmp_path / "run")
    need = row["rollout/groups"] + row["rollout/groups_missing"]
    assert f"  {row['rollout/groups']} of {need} groups\n" in said
    assert 0 < row["sampler/accuracy"] < 1
    said = train(data, tmp_path / "run", *smaller, "run.steps=2")
    assert "run.steps: 1 → 2" in said
    assert "another configuration" not in said
    assert len(metrics(tmp_path / "run")) == 2
