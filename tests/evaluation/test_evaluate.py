"""The program on the quickstart's model with random weights: standalone, in training, from every source of weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.quickstart import task
from fipo_megatron import evaluate
from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron
from fipo_megatron.config import load_config
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.observe.metrics import OF_DATA_SETS
from fipo_megatron.storage.output_lock import lock_output
from fipo_megatron.trainer.training_inputs import read_training_inputs
from tests import runs

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "quickstart" / "fipo.yaml"
PROBLEMS = 12
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Builds problems of two data sets, and a model."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    rows = [json.loads(line) for line in (directory / "held_out.jsonl").read_text().splitlines()[:PROBLEMS]]
    for row in rows[8:]:
        row["data_source"] = "other/set"
    (directory / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(data, output):
    return [
        *(f"model.path={data}/model", f"evaluation.files=[{data}/few.jsonl]", f"run.output={output}"),
        *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
        *("evaluation.samples_per_prompt=4", "rollout.max_response_tokens=12", "rollout.embedded_slots=32"),
    ]


def run(data, output, *overrides):
    """Runs the program in this process and returns its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return evaluate.main([str(CONFIG), *settings(data, output), *overrides])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trains two steps, with an evaluation before, between and after them."""
    output = tmp_path_factory.mktemp("runs") / "run"
    evaluating = [*settings(data, output), "run.steps=2", "run.evaluate_every=1", "checkpoint.save_every=1"]
    runs.train(data, output, *evaluating)
    return output


def test_a_run_writes_tags_and_rows(trained):
    rows = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    names = [f"evaluation/{data_set}/{name}" for data_set in ("few", "other_set") for name in OF_DATA_SETS]
    assert list(rows[0]) == ["step", "evaluation/accuracy", "evaluation/response_tokens", *names]
    files = sorted(file.name for file in (trained / "evaluations").iterdir())
    assert files == ["step-000000.jsonl", "step-000001.jsonl", "step-000002.jsonl"]
    problems = [json.loads(line) for line in (trained / "evaluations" / files[-1]).read_text().splitlines()]
    assert [problem["data_set"] for problem in problems] == ["few"] * 8 + ["other_set"] * 4
    right = sum(problem["right"] for problem in problems)
    assert 0 < right < 4 * PROBLEMS
    assert rows[-1]["evaluation/accuracy"] == right / (4 * PROBLEMS)


def test_every_source_of_weights_gives_the_rows_of_the_run(data, trained, tmp_path, capsys):
    """The run's checkpoint, its exported model and that model converted to a checkpoint have the same rows."""
    expected = (trained / "evaluations" / "step-000002.jsonl").read_bytes()
    hf_to_megatron(trained / "hf", tmp_path / "converted", Options())
    sources = {
        "trained": f"evaluation.checkpoint={trained}/checkpoints/step-000002",
        "hf": f"model.path={trained}/hf",
        "converted": f"evaluation.checkpoint={tmp_path}/converted",
    }
    for name, source in sources.items():
        assert run(data, tmp_path / "out", source, f"evaluation.name={name}") == 0
        output = tmp_path / "out" / f"evaluation-{name}"
        assert (output / "problems.jsonl").read_bytes() == expected
        assert sorted(file.name for file in output.iterdir()) == ["problems.jsonl", "summary.json"]
        assert "avg@4" in capsys.readouterr().out
    row = json.loads((trained / "evaluation.jsonl").read_text().splitlines()[-1])
    summary = json.loads((output / "summary.json").read_text())
    assert {"step": 2} | summary["scalars"] == row
    assert summary["checkpoint"] == f"{tmp_path}/converted"
    assert run(data, tmp_path / "out", f"evaluation.checkpoint={trained}/checkpoints/step-000001") == 0
    assert (tmp_path / "out" / "evaluation-step-000001" / "problems.jsonl").read_bytes() != expected


def test_a_second_evaluation_of_the_same_name_is_refused(data, tmp_path, caplog):
    with lock_output(tmp_path / "out" / "evaluation-a"):
        assert run(data, tmp_path / "out", "evaluation.name=a") == 1
    assert f"evaluation-a: process {os.getpid()} on" in caplog.text
    assert list((tmp_path / "out" / "evaluation-a").iterdir()) == []


def test_a_hugging_face_model_needs_no_megatron(data, tmp_path):
    """The evaluation of a Hugging Face model imports no Megatron and logs its progress."""
    code = (
        "import sys; from fipo_megatron import evaluate; code = evaluate.main(sys.argv[1:]); "
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'megatron']; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONFIG), *settings(data, tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{4 * PROBLEMS} of {4 * PROBLEMS} responses" in done.stderr
    assert "other_set" in done.stdout
    assert (tmp_path / "evaluation-model" / "summary.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/nowhere"], "model.path = '/nowhere': has no config.json"),
        (["evaluation.files=[]", "run.evaluate_every=0"], "evaluation.files: is empty"),
        (["evaluation.files=[/nowhere.jsonl]"], "/nowhere.jsonl: cannot be read"),
        (["evaluation.checkpoint=/nowhere"], "evaluation.checkpoint = /nowhere: not a torch_dist checkpoint"),
        (["evaluation.name=a/b"], "evaluation.name = 'a/b'"),
        (["evaluation.samples_per_prompt=0"], "evaluation.samples_per_prompt = 0"),
        (["reward.verifier=python:no.such"], "reward.verifier = python:no.such: there is no module"),
        (["rollout.max_response_tokens=120", "actor.token_budget=9999"], "must be at most the model's context"),
        (["rollout.servers.urls=['http://localhost:1']"], "needs rollout.engine = sglang"),
        ([f"run.output={__file__}/run"], "cannot be written"),
    ],
)
def test_errors_come_before_anything_is_built(overrides, message, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *overrides) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_gpu_of_the_engine_is_an_error_of_the_configuration(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(data, tmp_path / "out", "rollout.embedded_device=cuda") == 2
    assert "rollout.embedded_device = cuda: torch finds no GPU on this host; valid: cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_names_its_checkpoints(data, trained, tmp_path, capsys):
    assert run(data, tmp_path, f"evaluation.checkpoint={trained}") == 2
    assert f"there is {trained}/checkpoints/step-000001, {trained}/checkpoints/step-000002" in capsys.readouterr().err


def test_a_checkpoint_is_not_sent_to_servers_that_run(data, trained, tmp_path, capsys):
    by_servers = ["rollout.engine=sglang", "rollout.servers.urls=['http://127.0.0.1:1']"]
    assert run(data, tmp_path, *by_servers, f"evaluation.checkpoint={trained}/checkpoints/step-000002") == 2
    assert "must be null with rollout.servers.urls" in capsys.readouterr().err


def test_nothing_is_overwritten_and_several_processes_are_refused(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "evaluation-model").mkdir()
    (tmp_path / "evaluation-model" / "summary.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(data, tmp_path) == 2
    error = capsys.readouterr().err
    assert "evaluation-model: already holds an evaluation" in error
    assert "2 processes: an evaluation is one process" in error


def test_a_run_evaluates_no_checkpoint(data, tmp_path):
    training = [*settings(data, tmp_path / "run"), f"data.files=[{data}/problems.jsonl]", "evaluation.checkpoint=x"]
    with pytest.raises(InputError, match=r"evaluation.checkpoint = x: is for python -m fipo_megatron.evaluate alone"):
        read_training_inputs(load_config(CONFIG, training))


def test_weights_that_are_missing_are_noticed(data, tmp_path, capsys):
    shutil.copytree(data / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert run(data, tmp_path / "out", f"model.path={tmp_path}/model") == 2
    assert "holds neither model.safetensors nor" in capsys.readouterr().err


def test_unreachable_servers_end_the_evaluation(data, tmp_path, caplog):
    by_servers = ["rollout.engine=sglang", "rollout.servers.urls=['http://127.0.0.1:1']"]
    assert run(data, tmp_path, *by_servers) == 1
    assert "http://127.0.0.1:1" in caplog.text
    assert not list(tmp_path.rglob("*.json*"))


def test_a_verifier_that_fails_ends_the_evaluation_with_its_text(data, tmp_path, caplog, capsys):
    """About 30 % of the checks fail: too many by default; otherwise they are left out, and counted."""
    fails = "reward.verifier=python:tests.train_verifiers.by_chance_or_fails"
    assert run(data, tmp_path / "ended", fails) == 1
    assert "RuntimeError: the database is down" in caplog.text
    assert not list((tmp_path / "ended").rglob("*.json*"))
    caplog.clear()
    assert run(data, tmp_path / "told", fails, "reward.max_failure_fraction=0.9") == 0
    found = json.loads((tmp_path / "told" / "evaluation-model" / "summary.json").read_text())
    assert 0 < found["failed_checks"] < 4 * PROBLEMS
    assert f"the verifier failed on {found['failed_checks']} of {4 * PROBLEMS} answers, error: " in caplog.text
    assert f"{found['failed_checks']} responses whose check failed are left out" in capsys.readouterr().out


def test_sigterm_leaves_no_converted_model_behind(data, trained, tmp_path):
    """SIGTERM arrives while the program samples from a converted checkpoint."""
    longer = ["evaluation.samples_per_prompt=512", f"evaluation.checkpoint={trained}/checkpoints/step-000002"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fipo_megatron.evaluate", str(CONFIG), *settings(data, tmp_path), *longer],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = tmp_path / "evaluation-step-000002"
    while not (output / "hf.temporary").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output_text, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output_text
    assert "interrupted; there is no result" in output_text
    assert "Traceback" not in output_text
    assert not list(output.iterdir())
