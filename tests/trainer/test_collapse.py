"""Runs that the collapse alarm ends, or returns to an earlier checkpoint."""

import json
import signal

import pytest

from fipo_megatron.trainer import rollback_record
from fipo_megatron.trainer.rollback_record import Rollback
from tests.runs import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


ROLL_BACK = [
    *("checkpoint.save_every=1", "checkpoint.keep_last=1", "run.steps=9", "health.policy_kl_limit=0"),
    *("health.action=roll_back", "health.max_roll_backs=1", "health.roll_back_lr=0.5"),
]


def test_a_collapsed_run_rolls_back_then_ends_also_if_killed_between(data, tmp_path):
    """Every window of three steps counts as collapsed; the alarm is off for the first three steps."""
    for name, fail_at in (("whole", ""), ("killed", "update:4")):
        output = tmp_path / name
        output.mkdir()
        event = Rollback(number=1, step=9, to=7, cursor=9, learning_rate_factor=0.5, reason="of a run that is gone")
        rollback_record.write(output, [event])
        train(data, output, "checkpoint.save_every=1", "checkpoint.keep_last=1", "run.steps=3", "health.action=off")
        assert not rollback_record.read(output)
        if fail_at:
            train(data, output, *ROLL_BACK, fail_at=fail_at, code=-signal.SIGKILL)
            assert rows(output / "roll_backs.jsonl"), "it was killed in the first step after its return"
        said = train(data, output, *ROLL_BACK, code=3)
        assert "the run has collapsed" in said
        assert "with health.max_roll_backs=2 it returns once more" in said
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(data, whole, *ROLL_BACK, "health.action=warn")
    assert [(row["step"], row["began"], row["action"]) for row in rows(whole / "alarms.jsonl")] == [
        (5, 3, "stop"),
        (8, 3, "warn"),
    ], "the return is no alarm of the steps that are left, and the collapse began where it began"
    (event,) = rows(whole / "roll_backs.jsonl")
    assert "policy KL" in event["reason"]
    assert (event["step"], event["to"], event["learning_rate_factor"]) == (5, 3, 0.5)
    assert [row["step"] for row in metrics(killed)] == [0, 1, 2, 3, 4, 5]
    assert metrics(whole)[:6] == metrics(killed)
    assert (whole / "roll_backs.jsonl").read_bytes() == (killed / "roll_backs.jsonl").read_bytes()
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == [
        *("collapsed-step-000004-0", "collapsed-step-000005-0"),
        *("step-000003", "step-000004", "step-000006"),
    ], "that from before, the one after it, the newest"
    rates = [row["optimizer/learning_rate"] for row in metrics(whole)]
    assert rates[3] == pytest.approx(rates[2] * 0.5 * 8 / 6), "in the warm-up, at half the rate"


def test_a_second_roll_back_may_have_a_window_from_before_the_first(data, tmp_path):
    """Six healthy steps, then a learning rate that is too large for any policy."""
    output = tmp_path / "run"
    sound = [
        "checkpoint.save_every=1",
        "checkpoint.keep_last=1",
        "actor.optimizer.warmup_steps=0",
        "actor.optimizer.min_lr=0",
    ]
    train(data, output, *sound, "run.steps=6", "actor.optimizer.lr=1e-9")
    broken = ["run.steps=12", "actor.optimizer.lr=3e-2", "health.policy_kl_limit=0.01", "health.action=roll_back"]
    said = train(data, output, *sound, *broken, "health.max_roll_backs=2", "health.roll_back_lr=0.9", code=3)
    assert [(row["step"], row["to"]) for row in rows(output / "roll_backs.jsonl")] == [(7, 5), (6, 5)]
    [alarm] = rows(output / "alarms.jsonl")
    assert (alarm["step"], alarm["began"], alarm["action"]) == (6, 4, "stop")
    assert "with health.max_roll_backs=3 it returns once more" in said
    names = {path.name for path in (output / "checkpoints").glob("step-*")}
    assert "step-000005" in names, "where it will return to, if it may"


def test_a_run_without_an_earlier_checkpoint_cannot_roll_back(data, tmp_path):
    settings = ["run.steps=3", "health.policy_kl_limit=0", "health.action=roll_back"]
    said = train(data, tmp_path / "run", *settings, code=3)
    assert "It cannot return: there is no whole checkpoint of step 0 or before" in said
    assert "this was the last step" in said
    assert [row["action"] for row in rows(tmp_path / "run" / "alarms.jsonl")] == ["stop"]
