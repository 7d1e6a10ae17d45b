"""Whole runs that take an uncommon path through a step, and the preset of the paper."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.processes import ROOT, run_ranks
from tests.runs import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def test_a_step_without_a_token_in_the_loss_skips_its_updates(data, tmp_path):
    """Truncates all responses and masks truncated ones."""
    truncated = ["algorithm.mask_truncated=true", "rollout.max_response_tokens=1"]
    train(data, tmp_path / "run", "run.steps=2", *truncated)
    assert [row["optimizer/skipped_updates"] for row in metrics(tmp_path / "run")] == [2, 2]


def test_the_32b_preset_is_the_same_program(data, tmp_path):
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
    done = run_ranks("fipo_megatron.train", [str(preset), *overrides])
    assert done.code == 0, done.output[-4000:]
    assert [row["optimizer/updates"] for row in metrics(tmp_path / "run")] == [2, 2]
    assert all(row["optimizer/grad_norm"] > 0 for row in metrics(tmp_path / "run"))
    described = json.loads((tmp_path / "run/checkpoints/step-000002/run/manifest.json").read_text())["config"]
    assert (described["actor"]["dtype"], described["actor"]["distributed_optimizer"]) == ("bfloat16", True)
    assert described["algorithm"]["weight_clip"] == [1.0, 1.2]
