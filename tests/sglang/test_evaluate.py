"""Evaluations with a real server that runs already, and with one started for a converted checkpoint."""

import json
import shutil
import signal

import pytest

from fipo_megatron import evaluate
from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron
from tests.sglang.conftest import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
CONFIG = ROOT / "examples" / "quickstart" / "fipo.yaml"


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    """Returns a function that evaluates: it returns the rows of the problems, or the exit code on failure."""
    monkeypatch.setenv("FIPO_SGLANG_API_KEY", "secret")
    problems = [{"prompt": f"What is {n} plus five?", "answer": str(n + 5)} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    before = signal.getsignal(signal.SIGTERM)

    def evaluated(name, *overrides):
        code = evaluate.main(
            [
                str(CONFIG),
                *(f"model.path={model_path}", "data.chat_template=none", "run.evaluate_every=0"),
                *(f"evaluation.files=[{tmp_path}/sums.jsonl]", f"run.output={tmp_path}", f"evaluation.name={name}"),
                *("evaluation.samples_per_prompt=2", "rollout.max_response_tokens=12"),
                *("evaluation.temperature=0.01", "evaluation.top_p=0.01"),  # the most probable token, for any engine
                *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
                *overrides,
            ]
        )
        file = tmp_path / f"evaluation-{name}" / "problems.jsonl"
        return file.read_bytes() if code == 0 else code

    yield evaluated
    signal.signal(signal.SIGTERM, before)


def test_servers_give_the_rows_of_the_embedded_engine(server, model_path, run, tmp_path, caplog):
    expected = run("embedded")
    assert len(expected.splitlines()) == 6
    caplog.set_level("INFO")
    assert run("running", "rollout.engine=sglang", f"rollout.servers.urls=['{server.url}']") == expected
    assert f"{server.url}: SGLang 0.5.23, weight version 0" in caplog.text
    hf_to_megatron(model_path, tmp_path / "checkpoint", Options())
    started = [
        *("rollout.engine=sglang", f"rollout.servers.python={ROOT}/.venv-sglang/bin/python"),
        *("rollout.servers.ready_seconds=240", "rollout.sglang={max_total_tokens: 32768}"),
        f"evaluation.checkpoint={tmp_path}/checkpoint",
    ]
    assert run("started", *started) == expected
    assert not (tmp_path / "evaluation-started" / "hf.temporary").exists()


def test_a_server_of_another_model_is_refused(server, model_path, run, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    )
    by_server = ["rollout.engine=sglang", f"rollout.servers.urls=['{server.url}']"]
    assert run("other", f"model.path={other}", *by_server) == 1
    assert "not what the SGLang servers serve" in caplog.text
