"""Whole runs of the quickstart's model in processes of their own, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "quickstart" / "fipo.yaml"


def command(data, output, *overrides, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    settings = [
        *(f"model.path={data}/model", f"data.files=[{data}/problems.jsonl]", f"run.output={output}"),
        *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
        *("run.steps=5", "run.evaluate_every=0", "rollout.embedded_slots=32", "rollout.prompts_per_step=4"),
        *("rollout.samples_per_prompt=4", "actor.prompts_per_mini_batch=2", "rollout.max_response_tokens=24"),
    ]
    return [sys.executable, *launcher, "-m", "fipo_megatron.train", str(CONFIG), *settings, *overrides]


def train(data, output, *overrides, ranks=1, fail_at="", code=0):
    """What it said; the exit code is as expected."""
    done = subprocess.run(
        command(data, output, *overrides, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FIPO_FAIL_AT": fail_at},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said[-6000:]
    return said


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    files = sorted((output / "hf").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
