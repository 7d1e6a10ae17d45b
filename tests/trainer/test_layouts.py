"""Whole runs on the same responses: the layout does not change what is learned."""

import json

import pytest
from safetensors.torch import load_file

from tests.runs import metrics, train, train_by_command, weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

LAYOUTS = {
    "DP2": [],
    "TP2": ["actor.parallel.tensor_parallel=2"],
    "PP2": ["actor.parallel.pipeline_parallel=2"],
    "CP2": ["actor.parallel.context_parallel=2"],
}
TOKENS = "observe.trajectory_tokens=true"


@pytest.fixture(scope="module")
def replayed(data, recorded, tmp_path_factory):
    """The recorded responses on one rank: the run that the layouts are compared with."""
    output = tmp_path_factory.mktemp("runs") / "replayed"
    train(data, output, f"run.replay={recorded}/rollouts", TOKENS)
    return output


def assert_same_tokens(found, expected):
    """Compares the trajectory files: the same responses, and every per-token value to 1 %."""
    files = [sorted((run / "trajectories").iterdir()) for run in (found, expected)]
    rows = [[json.loads(line) for file in some for line in file.read_text().splitlines()] for some in files]
    assert len(rows[0]) == 5 * 8
    for one, other in zip(*rows, strict=True):
        tokens = other["tokens"]
        assert {k: v for k, v in one.items() if k != "tokens"} == {k: v for k, v in other.items() if k != "tokens"}
        assert one["tokens"].keys() == tokens.keys() >= {"shift", "future_kl", "weight", "entropy", "old_log_prob"}
        for name, column in tokens.items():
            same = column if name == "text" else pytest.approx(column, rel=1e-2, abs=1e-4)
            assert one["tokens"][name] == same, name


def assert_same_steps(found, expected, start):
    """Compares loss and gradient norm to 1e-4, and the update to 1e-2 of what the run changed."""
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        for tag, bounds in (("optimizer/grad_norm", {"rel": 1e-4}), ("policy/loss", {"rel": 1e-4, "abs": 1e-6})):
            assert one[tag] == pytest.approx(other[tag], **bounds)
        assert one["optimizer/updates"] == 2
    for name, before in load_file(start / "model.safetensors").items():
        moved = weights(expected)[name] - before
        assert moved.norm() > 0
        assert (weights(found)[name] - weights(expected)[name]).norm() <= 1e-2 * moved.norm(), name


def test_replayed_responses_reproduce_the_run_that_recorded_them(recorded, replayed):
    for one, other in zip(metrics(recorded), metrics(replayed), strict=True):
        assert one == other
    assert all(w.equal(weights(replayed)[name]) for name, w in weights(recorded).items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(name, data, recorded, replayed, tmp_path):
    train(data, tmp_path / "run", f"run.replay={recorded}/rollouts", TOKENS, *LAYOUTS[name], ranks=2)
    assert_same_steps(tmp_path / "run", replayed, data / "model")
    assert_same_tokens(tmp_path / "run", replayed)


def test_saved_under_tp2_and_resumed_under_pp2(data, recorded, replayed, tmp_path):
    replay = f"run.replay={recorded}/rollouts"
    train(data, tmp_path / "run", replay, *LAYOUTS["TP2"], "run.steps=3", ranks=2)
    said = train(data, tmp_path / "run", replay, *LAYOUTS["PP2"], ranks=2)
    assert "was saved under another layout" in said
    assert "actor.parallel.tensor_parallel: 2 → 1" in said
    assert_same_steps(tmp_path / "run", replayed, data / "model")


def test_the_optimizer_of_dp_reshardable_checkpoints_stays_in_its_layout(data, tmp_path):
    """Resumes exactly under the same layout; another one is an error before anything is built."""
    settings = ["actor.distributed_optimizer=true", "checkpoint.optimizer_sharding=dp_reshardable", "run.steps=3"]
    train(data, tmp_path / "whole", *settings, ranks=2)
    train(data, tmp_path / "run", *settings, "run.steps=2", ranks=2)
    said = train(data, tmp_path / "run", *settings, *LAYOUTS["PP2"], ranks=2, code=2)
    assert "actor.parallel.pipeline_parallel = 2: must be 1 to go on from" in said
    train(data, tmp_path / "run", *settings, "checkpoint.optimizer_sharding=fully_reshardable", ranks=2)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_overlapped_ranks_stay_in_step(data, tmp_path):
    """Sampling goes on between the ranks during the collectives of the update; the first run is torchrun's."""
    overlapping = ["rollout.overlap=true", "rollout.max_staleness=1", "checkpoint.save_every=2"]
    train_by_command(data, tmp_path / "run", *overlapping, ranks=2)
    train(data, tmp_path / "run", *overlapping, "run.steps=7", ranks=2)
    rows = metrics(tmp_path / "run")
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 0, 1]
    assert all(row["sampler/groups_sampled"] for row in rows)
