"""The quickstart's programs on a GPU, end to end: supervised steps, FIPO steps, a checkpoint, a resume, an export."""

import json
import math
import subprocess
import sys

import pytest

from examples.quickstart import task
from examples.quickstart.two_stages import HERE

SHARED = ("seed=1", "actor.dtype=bfloat16", "actor.distributed_optimizer=true", "checkpoint.save_every=3")


def train(config, *overrides):
    command = [sys.executable, "-m", "fipo_megatron.train", str(HERE / config), *SHARED, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_the_quickstart_trains_and_resumes_on_a_gpu(device, tmp_path, record_property):
    data, sft, fipo = tmp_path / "data", tmp_path / "sft", tmp_path / "fipo"
    task.build(data, 1)
    train("sft.yaml", f"run.output={sft}", f"model.path={data}/model", f"data.files=[{data}/examples.jsonl]")
    losses = [row["policy/loss"] for row in rows(sft)]
    assert losses[-1] < 0.5 * losses[0]
    settings = (
        f"run.output={fipo}",
        f"model.path={sft}/hf",
        f"data.files=[{data}/problems.jsonl]",
        f"evaluation.files=[{data}/held_out.jsonl]",
        "run.evaluate_every=0",
        "run.preflight=off",  # it checked the memory before the supervised steps, which takes 15 seconds
    )
    train("fipo.yaml", *settings, "run.steps=3")
    train("fipo.yaml", *settings, "run.steps=6")
    found = rows(fipo)
    assert [row["step"] for row in found] == list(range(6))
    for name in ("rollout/accuracy", "optimizer/grad_norm", "policy/loss", "mismatch/kl"):
        value = found[-1].get(name, math.nan)
        record_property(name, value)
        print(f"{name} = {value:.4g}")
    assert (fipo / "hf" / "model.safetensors").stat().st_size > 0
