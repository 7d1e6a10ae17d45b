"""Whole runs in processes of their own: layouts, kills and recordings do not change what is learned."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from examples.quickstart import task
from fipo_megatron.actor import parallel
from fipo_megatron.checkpoint.manager import CheckpointManager
from fipo_megatron.config import Config, ParallelConfig
from tests.runs import ROOT, command, metrics, train, weights

RANDOM_KILLS = int(os.environ.get("FIPO_RANDOM_KILLS", "0"))
FAIL_POINTS = os.environ.get("FIPO_FAIL_POINTS", "checkpoint_publish:1,update:4").split(",")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Problems, and a model of the quickstart's with random weights."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    return directory


LAYOUTS = {
    "DP2": [],
    "TP2": ["actor.parallel.tensor_parallel=2"],
    "PP2": ["actor.parallel.pipeline_parallel=2"],
    "CP2": ["actor.parallel.context_parallel=2"],
}


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """Five steps of one rank, with their responses."""
    output = tmp_path_factory.mktemp("runs") / "recorded"
    train(data, output, "run.record_rollouts=true", "checkpoint.save_every=2")
    return output


@pytest.fixture(scope="module")
def replayed(data, recorded, tmp_path_factory):
    """The same responses again, with one rank: what the others are compared with."""
    output = tmp_path_factory.mktemp("runs") / "replayed"
    train(data, output, f"run.replay={recorded}/rollouts", TOKENS)
    return output


TOKENS = "observe.trajectory_tokens=true"


def assert_same_tokens(found, expected):
    """What is kept of responses: the same ones, and every value of every token, wherever it was computed."""
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
    """Loss and gradient norm to 1e-4, the update to 1e-2 of what the run changed."""
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        for tag, bounds in (("optimizer/grad_norm", {"rel": 1e-4}), ("policy/loss", {"rel": 1e-4, "abs": 1e-6})):
            assert one[tag] == pytest.approx(other[tag], **bounds)
        assert one["optimizer/updates"] == 2
    for name, before in load_file(start / "model.safetensors").items():
        moved = weights(expected)[name] - before
        assert moved.norm() > 0
        assert (weights(found)[name] - weights(expected)[name]).norm() <= 1e-2 * moved.norm(), name


def test_replayed_responses_give_the_run_that_recorded_them(recorded, replayed):
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


CARRYING = [
    *("rollout.over_sampling=1.5", "rollout.max_staleness=1", "rollout.embedded_slots=16", "checkpoint.save_every=2")
]


OVERLAPPING = ["rollout.overlap=true", *CARRYING]


@pytest.mark.parametrize("settings", [CARRYING, OVERLAPPING], ids=["carrying", "overlapping"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(settings, data, tmp_path):
    """Killed at every fail point, resumed each time: the same metrics and weights, bit for bit."""
    train(data, tmp_path / "whole", *settings)
    for fail_at in FAIL_POINTS:
        train(data, tmp_path / "killed", *settings, fail_at=fail_at, code=-signal.SIGKILL)
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
    rows = metrics(tmp_path / "whole")
    if settings is CARRYING:
        assert any(row["sampler/prompts_carried_in"] for row in rows)
    else:
        assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
        assert all(row["mismatch/importance_weight_mean"] for row in rows)
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000005"], "the newest, and that from before the window"


def test_ranks_overlap_alike(data, tmp_path):
    """Sampling goes on, between the ranks, while they are in collectives of the update."""
    overlapping = ["rollout.overlap=true", "rollout.max_staleness=1", "checkpoint.save_every=2"]
    train(data, tmp_path / "run", *overlapping, ranks=2)
    train(data, tmp_path / "run", *overlapping, "run.steps=7", ranks=2)
    rows = metrics(tmp_path / "run")
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 0, 1]
    assert all(row["sampler/groups_sampled"] for row in rows)


def test_asked_to_end_it_saves_and_goes_on_later(data, tmp_path):
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
    train(data, tmp_path / "run")
    assert file.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(data, recorded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    damaged = run / "checkpoints" / "step-000005" / "run" / "manifest.json"
    damaged.write_text(damaged.read_text().replace('"step": 5', '"step": 4'))
    said = train(data, run, "run.record_rollouts=true", "checkpoint.save_every=2")
    assert "step-000005 IS DAMAGED, the one before it is used" in said
    assert f"goes on from {run}/checkpoints/step-000004" in said
    assert (run / "checkpoints" / "damaged-step-000005-0").is_dir()
    assert (run / "metrics.jsonl").read_bytes() == (recorded / "metrics.jsonl").read_bytes()


def test_a_return_passes_over_what_is_damaged(recorded, tmp_path):
    shutil.copytree(recorded / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-000004" / "run" / "manifest.json").write_text("{}")
    layout = parallel.initialize(ParallelConfig(), seed=1, environment={})
    try:
        reader = CheckpointManager(tmp_path / "checkpoints", Config(), SimpleNamespace(layout=layout), None)
        assert reader.newest(until=1) is None
        assert reader.newest(until=4) == tmp_path / "checkpoints" / "step-000002"
        assert reader.newest() == tmp_path / "checkpoints" / "step-000005"
        reader.close()
    finally:
        parallel.destroy()
    assert (tmp_path / "checkpoints" / "damaged-step-000004-0").is_dir()


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_rate_that_was_changed_is_taken(distributed, data, tmp_path):
    settings = [f"actor.distributed_optimizer={distributed}", "checkpoint.save_every=1"]
    changed = ["actor.optimizer.lr=1e-3", "actor.optimizer.warmup_steps=2", "actor.optimizer.schedule=constant"]
    train(data, tmp_path / "run", *settings, "run.steps=1")
    said = train(data, tmp_path / "run", *settings, *changed, "run.steps=2")
    assert "actor.optimizer.lr: 0.0003 → 0.001" in said
    assert [row["optimizer/learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx([3e-4 / 6, 1e-3])


def test_a_step_without_a_token_in_the_loss_is_passed_over(data, tmp_path):
    """All responses are cut off, and those that are do not count."""
    cut_off = ["algorithm.mask_truncated=true", "rollout.max_response_tokens=1"]
    train(data, tmp_path / "run", "run.steps=2", *cut_off)
    assert [row["optimizer/skipped_updates"] for row in metrics(tmp_path / "run")] == [2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/nowhere"], "model.path = '/nowhere': has no config.json"),
        (["data.files=[]"], "data.files: is empty"),
        (["data.max_prompt_tokens=120", "actor.token_budget=9999"], "= 144: must be at most the model's context"),
        (["data.max_prompt_tokens=3"], "data.max_prompt_tokens = 3: all"),
        (["reward.verifier=python:no.such"], "reward.verifier = python:no.such: there is no module"),
        ([f"run.output={__file__}/run"], "test_train.py/run: cannot be written"),
        (
            ["actor.parallel.tensor_parallel=2"],
            "tensor_parallel = 2 × pipeline_parallel = 1 × context_parallel = 1 needs",
        ),
        (["rollout.prompts_per_stp=3"], "did you mean rollout.prompts_per_step?"),
    ],
)
def test_errors_come_before_anything_is_built(overrides, message, data, tmp_path):
    start = time.monotonic()
    said = train(data, tmp_path / "run", *overrides, code=2)
    assert message in said
    assert "Traceback" not in said
    assert "megatron" not in said.replace("fipo_megatron", "").lower()
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 60


def test_what_megatron_does_not_know_and_a_port_in_use(data, tmp_path, monkeypatch):
    said = train(data, tmp_path / "run", "actor.transformer.recompute_granularty=full", code=2)
    assert "did you mean recompute_granularity?" in said
    assert "Traceback" not in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (launch | {"MASTER_PORT": taken.getsockname()[1]}).items():
            monkeypatch.setenv(name, str(value))
        said = train(data, tmp_path / "run", code=1)
        assert f"MASTER_PORT = {taken.getsockname()[1]}: another program listens there" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_chat_template_and_another_run_in_the_output(data, recorded, tmp_path):
    shutil.copytree(data / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    said = train(data, recorded, f"model.path={tmp_path}/model", "checkpoint.resume=never", code=2)
    assert "its tokenizer has no chat template" in said
    assert f"run.output = {recorded}: already holds a run" in said


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_built(data, recorded, tmp_path):
    shutil.copytree(data / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5000.0, "intermediate_size": 128})
    )
    said = train(data, recorded, f"model.path={tmp_path}/model", code=2)
    assert "step-000005: a checkpoint of another model: " in said
    assert "192 → 128" in said


def test_the_optimizer_of_dp_reshardable_checkpoints_stays_where_it_is(data, tmp_path):
    """The same steps as without a stop, and an error before anything is built under another layout."""
    settings = ["actor.distributed_optimizer=true", "checkpoint.optimizer_sharding=dp_reshardable", "run.steps=3"]
    train(data, tmp_path / "whole", *settings, ranks=2)
    train(data, tmp_path / "run", *settings, "run.steps=2", ranks=2)
    said = train(data, tmp_path / "run", *settings, *LAYOUTS["PP2"], ranks=2, code=1)  # torchrun's own code
    assert "actor.parallel.pipeline_parallel = 2: must be 1 to go on from" in said
    train(data, tmp_path / "run", *settings, "checkpoint.optimizer_sharding=fully_reshardable", ranks=2)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_the_preset_of_32b_is_the_same_program(data, tmp_path):
    """Its file, with a tiny model, a tiny batch and data in the schema of DAPO-Math-17k; every other value stands."""
    problems = [json.loads(line) for line in (data / "problems.jsonl").read_text().splitlines()[:64]]
    table = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in problems],
        "reward_model": [{"style": "rule", "ground_truth": row["answer"]} for row in problems],
        "data_source": ["sums"] * len(problems),
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "dapo-math-17k.parquet")
    sizes = {
        "model.path": f"{data}/model",
        "data.files": f"[{tmp_path}/dapo-math-17k.parquet]",
        "data.max_prompt_tokens": 40,
        "rollout.engine": "embedded",
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 4,
        "rollout.max_response_tokens": 24,
        "reward.verifier": "python:tests.train_verifiers.by_chance",
        "reward.overlong_buffer_tokens": 8,
        "actor.prompts_per_mini_batch": 2,
        "run.steps": 2,
        "run.output": tmp_path / "run",
    }
    preset = ROOT / "examples" / "configs" / "fipo_qwen2.5_32b.yaml"
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "fipo_megatron.train", str(preset), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["optimizer/updates"] for row in metrics(tmp_path / "run")] == [2, 2]
    assert all(row["optimizer/grad_norm"] > 0 for row in metrics(tmp_path / "run"))
    described = json.loads((tmp_path / "run/checkpoints/step-000002/run/manifest.json").read_text())["config"]
    assert (described["actor"]["dtype"], described["actor"]["distributed_optimizer"]) == ("bfloat16", True)
    assert described["algorithm"]["weight_clip"] == [1.0, 1.2]


def test_a_step_that_cannot_be_finished_is_saved_as_far_as_it_was_sampled(data, tmp_path):
    """No group is kept: the error says so, and the prompts that were used up are not given again."""
    hopeless = ["reward.verifier=exact", "rollout.on_exhausted=error", "rollout.max_generation_batches=2"]
    train(data, tmp_path / "run", "run.steps=2")
    said = train(data, tmp_path / "run", *hopeless, "run.steps=4", "algorithm.kind=dapo", code=1)
    assert "SamplingExhaustedError: 0 of 4 groups after 2 batches of prompts" in said
    assert "Traceback" not in said
    assert metrics(tmp_path / "run")[-1]["step"] == 1
