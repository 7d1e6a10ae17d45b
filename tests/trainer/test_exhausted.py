"""Runs that find too few groups: a rerun goes on where the run before ended, and the advice helps."""

import json
import re
import signal

import pytest

from tests.runs import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RARE = [
    *("reward.verifier=python:tests.train_verifiers.rarely", "rollout.on_exhausted=error", "run.steps=1"),
    *("rollout.max_generation_batches=2", "algorithm.kind=dapo"),
]


def cursor(output, step):
    return json.loads((output / "checkpoints" / f"step-{step:06}" / "run" / "manifest.json").read_text())["cursor"]


def test_a_rerun_goes_on_where_the_run_before_was_exhausted(data, tmp_path):
    """At step 0 without a checkpoint, then with one, whose exchange is killed once; each run has more groups."""
    run, found = tmp_path / "run", []
    for kill in ("", "checkpoint_published:1", ""):
        said = train(data, run, *RARE, fail_at=kill, code=-signal.SIGKILL if kill else 1)
        if kill:
            assert (run / "checkpoints" / "step-000000.again").is_dir()
            continue
        assert "Traceback" not in said
        assert "is in the checkpoint of step 0; run it again to go on" in said
        kept = int(re.search(r"SamplingExhaustedError: (\d) of 4 groups after 2 batches", said)[1])
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]
        found.append((cursor(run, 0), kept))
    (first_cursor, first_kept), (last_cursor, last_kept) = found
    assert last_cursor >= first_cursor + 12, "two more runs, each with other prompts"
    assert first_kept <= last_kept
    train(data, run, *RARE, "rollout.on_exhausted=smaller")
    [row] = metrics(run)
    assert row["sampler/groups_carried_in"] == last_kept
    assert last_kept


def test_used_up_epochs_are_told_with_what_helps(data, tmp_path):
    """Four prompts, of which the first step uses all: the second has none, whether it may be smaller or not."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((data / "problems.jsonl").read_text().splitlines(keepends=True)[:4]))
    settings = [f"data.files=[{few}]", "data.epochs=1", "run.steps=3", "algorithm.dynamic_sampling=false"]
    run = tmp_path / "run"
    for action in ("smaller", "error"):
        said = train(data, run, *settings, f"rollout.on_exhausted={action}", code=1)
        assert "0 of 4 groups after 0 batches of prompts; data.epochs is used up" in said
        helps = "run it again with a larger data.epochs to go on, or with run.steps=1 to end it here"
        assert f"is in the checkpoint of step 1; {helps}" in said
    train(data, run, *settings, "run.steps=1")
    assert (run / "hf" / "config.json").exists()
    train(data, run, *settings, "data.epochs=2", "run.steps=2")
    assert [row["step"] for row in metrics(run)] == [0, 1]


def test_a_response_that_cannot_be_used_is_not_saved_and_told_as_lasting(data, tmp_path):
    """The learning rate makes the weights overflow, so that log-probs are not finite."""
    settings = [
        "actor.optimizer.lr=1e12",
        "actor.optimizer.min_lr=0",
        "actor.optimizer.warmup_steps=0",
        "actor.optimizer.clip_grad=0",
    ]
    said = train(data, tmp_path / "run", *settings, "health.action=off", "run.steps=3", code=1)
    assert "PermanentEngineError: the engine returned a response that cannot be used" in said
    assert "step 1 is not saved: the same error would occur again. The run would go on from step 0" in said
    assert "run it again to go on" not in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
