"""Runs whose verifier fails: masked and told, or ended with the text, saved, and resumed after the repair."""

import json

import pytest

from fipo_megatron.observe import metrics as registry
from tests.runs import metrics, train, weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
VERIFIERS = "reward.verifier=python:tests.train_verifiers"
FAILS = f"{VERIFIERS}.by_chance_or_fails"


def test_failed_checks_are_masked_counted_and_told(data, tmp_path):
    generous = "reward.max_failure_fraction=0.6"
    said = train(data, tmp_path / "run", FAILS, generous, "run.steps=2", "observe.trajectories=64")
    rows = metrics(tmp_path / "run")
    assert all(row["sampler/failures_error"] > 0 for row in rows)
    documented = {metric.tag for metric in registry.METRICS}
    assert {tag for row in rows for tag in row} - {"step"} <= documented
    assert said.count("RuntimeError: the database is down") == 2, "one warning per step"
    kept = [json.loads(line) for line in (tmp_path / "run/trajectories/from-000000.jsonl").read_text().splitlines()]
    assert {row["accuracy"] for row in kept} == {0, 1}
    assert (tmp_path / "run" / "hf").exists()


def test_failed_checks_that_count_as_wrong(data, tmp_path):
    settings = ["reward.max_failure_fraction=0.6", "reward.on_failure=wrong", "run.steps=1"]
    train(data, tmp_path / "run", FAILS, *settings)
    [row] = metrics(tmp_path / "run")
    assert row["sampler/failures_error"] > 0


def test_too_many_failures_end_a_run_that_goes_on_after_the_repair(data, tmp_path):
    """The verifier breaks after step 1; the run, resumed, ends as if it had not."""
    home = {"HOME": str(tmp_path)}
    verifier = f"{VERIFIERS}.by_chance_unless_broken"
    settings = ["run.steps=3", "checkpoint.save_every=1", "observe.tensorboard=false"]
    train(data, tmp_path / "whole", verifier, *settings, environment=home)
    train(data, tmp_path / "run", verifier, *settings, "run.steps=2", environment=home)
    (tmp_path / "broken").touch()
    said = train(data, tmp_path / "run", verifier, *settings, code=1, environment=home)
    assert "VerifierError: the verifier failed on" in said
    assert "RuntimeError: the database is down" in said
    assert "Traceback" not in said
    (tmp_path / "broken").unlink()
    train(data, tmp_path / "run", verifier, *settings, environment=home)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, two = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(one[name].equal(two[name]) for name in two)


def test_all_ranks_end_with_the_text(data, tmp_path):
    said = train(data, tmp_path / "run", FAILS, "reward.max_failure_fraction=0.01", "run.steps=1", ranks=2, code=1)
    assert "RuntimeError: the database is down" in said
    assert "Traceback" not in said


def test_an_evaluation_that_fails_ends_the_run(data, tmp_path):
    evaluating = ["run.evaluate_every=1", f"evaluation.files=[{data}/held_out.jsonl]", "run.steps=1"]
    said = train(
        data,
        tmp_path / "run",
        FAILS,
        *evaluating,
        "evaluation.samples_per_prompt=1",
        "reward.max_failure_fraction=0.01",
        code=1,
    )
    assert "the database is down" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "evaluation.jsonl").exists()
