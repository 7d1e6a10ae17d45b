"""Errors of the command line: exit code and message, before anything is built and before the output is touched."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

import fipo_megatron.train
from tests.runs import ROOT, arguments, metrics, train

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def error_of(capsys):
    """Calls ``fipo_megatron.train.main`` in this process; returns what it printed."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]

    def call(*overrides, code=2):
        assert fipo_megatron.train.main(arguments(*overrides)) == code
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed
        return printed

    yield call
    root.level, root.handlers[:] = before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/nowhere"], "model.path = '/nowhere': has no config.json"),
        (["data.files=[]"], "data.files: is empty"),
        (["data.max_prompt_tokens=120", "actor.token_budget=9999"], "= 144: must be at most the model's context"),
        (["data.max_prompt_tokens=3"], "data.max_prompt_tokens = 3: all"),
        (["reward.verifier=python:no.such"], "reward.verifier = python:no.such: there is no module"),
        ([f"run.output={__file__}/run"], "test_errors.py/run: cannot be written"),
        (["run.output=/proc/run"], "run.output = /proc/run: cannot be written"),
        (["run.output=/dev/null/run"], "run.output = /dev/null/run: cannot be written"),
        ([f"run.output={'x' * 300}"], "cannot be written: File name too long"),
        ([f"run.output=/tmp/{'x' * 300}/run"], "cannot be written: File name too long"),
        (
            ["actor.parallel.tensor_parallel=2"],
            "tensor_parallel = 2 × pipeline_parallel = 1 × context_parallel = 1 needs",
        ),
        (["rollout.prompts_per_stp=3"], "did you mean rollout.prompts_per_step?"),
    ],
)
def test_errors_come_before_anything_is_built(overrides, message, data, tmp_path, error_of):
    said = error_of(data, tmp_path / "run", *overrides)
    assert message in said
    assert "megatron" not in said.replace("fipo_megatron", "").lower()
    assert not (tmp_path / "run").exists()


def test_an_option_that_megatron_does_not_know(data, tmp_path, error_of):
    said = error_of(data, tmp_path / "run", "actor.transformer.recompute_granularty=full")
    assert "did you mean recompute_granularity?" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "RANK: expected a number in the environment, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE: expected a number in the environment, got 'abc'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: expected a number in the environment, got None"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "SLURM_NTASKS = 8: this process is alone"),
    ],
)
def test_a_wrong_environment_is_told_at_once(environment, message, data, tmp_path, error_of, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in error_of(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_the_command_exits_with_2_and_imports_no_megatron(data, tmp_path):
    """Python itself lists the modules that the command imports."""
    start, overrides = time.monotonic(), arguments(data, tmp_path / "run", "data.max_prompt_tokens=3")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fipo_megatron.train", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2, said
    assert "data.max_prompt_tokens = 3: all" in said
    assert "Traceback" not in said
    assert {"torch", "transformers", "fipo_megatron.config"} <= imported
    assert not [name for name in imported if name.partition(".")[0] == "megatron"]
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 60


@pytest.mark.processes
def test_a_typo_is_told_without_torch(data, tmp_path):
    """Its import, and that of transformers, takes most of the start-up time."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fipo_megatron.train", *arguments(data, tmp_path / "run", "typo=1")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2
    assert "typo = 1: unknown key" in done.stderr
    assert "fipo_megatron.config" in imported
    assert not imported & {"torch", "transformers", "aiohttp", "pyarrow", "safetensors", "megatron", "rich"}


@pytest.mark.distributed
def test_a_port_in_use(data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = train(data, tmp_path / "run", code=1, environment=launch)
    assert f"MASTER_PORT = {port}: another program listens there" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_tokenizer_without_chat_template_and_another_run_in_the_output(data, recorded, tmp_path, error_of):
    shutil.copytree(data / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    said = error_of(data, recorded, f"model.path={tmp_path}/model", "checkpoint.resume=never")
    assert "its tokenizer has no chat template" in said
    assert f"run.output = {recorded}: already holds a run" in said


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_built(data, recorded, tmp_path, error_of):
    shutil.copytree(data / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5000.0, "intermediate_size": 128})
    )
    said = error_of(data, recorded, f"model.path={tmp_path}/model")
    assert "step-000005: a checkpoint of another model: " in said
    assert "192 → 128" in said


@pytest.mark.distributed
def test_an_exhausted_step_is_saved_as_far_as_it_was_sampled(data, tmp_path):
    """No group is kept: the error says so, and the run is saved with its metrics up to the step before."""
    hopeless = ["reward.verifier=exact", "rollout.on_exhausted=error", "rollout.max_generation_batches=2"]
    train(data, tmp_path / "run", "run.steps=2")
    said = train(data, tmp_path / "run", *hopeless, "run.steps=4", "algorithm.kind=dapo", code=1)
    assert "SamplingExhaustedError: 0 of 4 groups after 2 batches of prompts" in said
    assert "Traceback" not in said
    assert metrics(tmp_path / "run")[-1]["step"] == 1
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome == {"outcome": "failed", "step": 2, "exit_code": 1}
