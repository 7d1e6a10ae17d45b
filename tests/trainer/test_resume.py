"""Whole runs that end early: resumed, they give the metrics and weights of a run that did not, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fipo_megatron.actor import parallel
from fipo_megatron.checkpoint.manager import CheckpointManager
from fipo_megatron.config import Config, ParallelConfig
from tests.runs import ROOT, command, metrics, train, weights

RANDOM_KILLS = int(os.environ.get("FIPO_RANDOM_KILLS", "0"))
# The fifth update comes after the second checkpoint was begun, which waits until the first one is complete.
FAIL_POINTS = os.environ.get("FIPO_FAIL_POINTS", "checkpoint_publish:1,update:5").split(",")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

CARRYING = [
    *("rollout.over_sampling=1.5", "rollout.max_staleness=1", "rollout.embedded_slots=16", "checkpoint.save_every=2")
]
OVERLAPPING = ["rollout.overlap=true", *CARRYING]


@pytest.mark.parametrize("settings", [CARRYING, OVERLAPPING], ids=["carrying", "overlapping"])
def test_a_killed_run_ends_as_one_that_was_not_killed(settings, data, tmp_path):
    """Killed at every fail point, resumed each time: the same metrics and weights, bit for bit."""
    train(data, tmp_path / "whole", *settings)
    for fail_at in FAIL_POINTS:
        train(data, tmp_path / "killed", *settings, fail_at=fail_at, code=-signal.SIGKILL)
        assert not (tmp_path / "killed" / "outcome.json").exists()
    random = np.random.default_rng()
    for _ in range(RANDOM_KILLS):
        process = subprocess.Popen(
            command(data, tmp_path / "killed", *settings),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(random.uniform(4, 12))
        process.kill()
        process.wait()
    said = train(data, tmp_path / "killed", *settings)
    assert RANDOM_KILLS or "goes on from" in said
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert all(w.equal(weights(tmp_path / "killed")[name]) for name, w in weights(tmp_path / "whole").items())
    assert {row["run/restarts"] for row in timing(tmp_path / "whole")} == {0}
    assert timing(tmp_path / "killed")[-1]["run/restarts"] >= len(FAIL_POINTS)
    rows = metrics(tmp_path / "whole")
    if settings is CARRYING:
        assert any(row["sampler/prompts_carried_in"] for row in rows)
    else:
        assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
        assert all(row["mismatch/importance_weight_mean"] for row in rows)
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000005"], "the newest, and the one from before the window"


def test_prefetched_groups_are_dropped_if_staleness_is_not_allowed_any_more(data, tmp_path):
    """The fail point kills the run in a step whose groups were prefetched by the step before."""
    overlapping = ["rollout.overlap=true", "rollout.max_staleness=1", "checkpoint.save_every=2"]
    overlapping.append("checkpoint.async_save=false")  # the checkpoint of step 2 is there when step 3 is killed
    train(data, tmp_path / "run", *overlapping, fail_at="update:4", code=-signal.SIGKILL)
    said = train(data, tmp_path / "run", "checkpoint.save_every=2")
    assert "prefetched groups are dropped: they are 1 versions old, rollout.max_staleness is 0" in said
    assert [row["rollout/staleness_max"] for row in metrics(tmp_path / "run")] == [0, 1, 0, 0, 0]


def timing(run):
    return [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]


def outcome(run):
    return json.loads((run / "outcome.json").read_text())


def test_sigterm_saves_and_the_next_start_resumes(data, tmp_path):
    """A process started by the command line: exit code 0 after the step, no export; then the same metrics."""
    whole = tmp_path / "whole"
    train(data, whole)
    process = subprocess.Popen(
        command(data, tmp_path / "run"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    file = tmp_path / "run" / "metrics.jsonl"
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "SIGTERM: the run ends after this step" in said
    assert len(metrics(tmp_path / "run")) < 5
    assert not (tmp_path / "run" / "hf").exists()
    assert outcome(tmp_path / "run") == {"outcome": "stopped", "step": len(metrics(tmp_path / "run")), "exit_code": 0}
    train(data, tmp_path / "run")
    assert outcome(tmp_path / "run") == {"outcome": "complete", "step": 5, "exit_code": 0}
    assert file.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_file_asks_a_run_to_end_after_its_step(data, tmp_path):
    """It may be there before the run has started; the run removes it, so that the next start goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    said = train(data, tmp_path / "run", "run.steps=2")
    assert "ended after step 0, as asked" in said
    assert outcome(tmp_path / "run") == {"outcome": "stopped", "step": 1, "exit_code": 0}
    train(data, tmp_path / "run", "run.steps=2")
    assert outcome(tmp_path / "run") == {"outcome": "complete", "step": 2, "exit_code": 0}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(data, recorded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    damaged = run / "checkpoints" / "step-000005" / "run" / "manifest.json"
    damaged.write_text(damaged.read_text().replace('"step": 5', '"step": 4'))
    said = train(data, run, "run.record_rollouts=true", "checkpoint.save_every=2")
    assert "step-000005 IS DAMAGED, the one before it is used" in said
    assert f"goes on from {run}/checkpoints/step-000004" in said
    assert (run / "checkpoints" / "damaged-step-000005-0").is_dir()
    assert (run / "metrics.jsonl").read_bytes() == (recorded / "metrics.jsonl").read_bytes()


def test_the_newest_checkpoint_until_a_step_skips_damaged_ones(recorded, tmp_path):
    shutil.copytree(recorded / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-000004" / "run" / "manifest.json").write_text("{}")
    layout = parallel.initialize(ParallelConfig(), seed=1, environment={})
    try:
        manager = CheckpointManager(tmp_path / "checkpoints", Config(), SimpleNamespace(layout=layout), None)
        assert manager.newest(until=1) is None
        assert manager.newest(until=4) == tmp_path / "checkpoints" / "step-000002"
        assert manager.newest() == tmp_path / "checkpoints" / "step-000005"
        manager.close()
    finally:
        parallel.destroy()
    assert (tmp_path / "checkpoints" / "damaged-step-000004-0").is_dir()


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_changed_learning_rate_applies_after_a_resume(distributed, data, tmp_path):
    settings = [f"actor.distributed_optimizer={distributed}", "checkpoint.save_every=1"]
    changed = ["actor.optimizer.lr=1e-3", "actor.optimizer.warmup_steps=2", "actor.optimizer.schedule=constant"]
    train(data, tmp_path / "run", *settings, "run.steps=1")
    said = train(data, tmp_path / "run", *settings, *changed, "run.steps=2")
    assert "actor.optimizer.lr: 0.0003 → 0.001" in said
    assert [row["optimizer/learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx([3e-4 / 6, 1e-3])
