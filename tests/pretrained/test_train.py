"""A real pretrained model takes FIPO steps end to end on arithmetic."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT
from tests.pretrained import smollm2

pytestmark = [pytest.mark.pretrained, pytest.mark.timeout(1200)]


def test_two_steps_of_fipo(tmp_path):
    """Samples 4 × 4 responses of 64 tokens each per step; prints the seconds of each part."""
    model = smollm2.prepare()
    problems = [
        {"prompt": f"What is {a} + {b}? End with 'Answer: ' and the number.", "answer": str(a + b)}
        for a, b in ((2, 2), (3, 4), (5, 1), (7, 2), (6, 6), (1, 8), (9, 3), (4, 7))
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    settings = [
        *(f"model.path={model}", f"data.files=[{tmp_path}/problems.jsonl]", f"run.output={tmp_path}/run"),
        *("run.steps=2", "checkpoint.save_every=0", "run.evaluate_every=0", "algorithm.dynamic_sampling=false"),
        *("data.max_prompt_tokens=64", "rollout.max_response_tokens=64", "rollout.embedded_slots=16"),
        *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "actor.prompts_per_mini_batch=2"),
        *("actor.token_budget=512", "actor.optimizer.schedule=constant", "actor.optimizer.lr=1e-5"),
        *("actor.optimizer.min_lr=0", "reward.verifier=math", "reward.truncated_is_wrong=false"),
        "reward.overlong_buffer_tokens=48",
    ]
    command = [sys.executable, "-m", "fipo_megatron.train", "examples/quickstart/fipo.yaml", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["optimizer/updates"] - row["optimizer/skipped_updates"] for row in rows] == [2, 2]
    assert all(row["optimizer/grad_norm"] > 0 for row in rows)
    assert all(row["mismatch/abs_max"] < 1e-3 for row in rows), "transformers and Megatron agree on a real model"
    assert all(0.5 < row["policy/entropy"] < 5 for row in rows)
    print("seconds per part:", (tmp_path / "run" / "timing.jsonl").read_text())
