"""Whole runs of the quickstart's model, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from safetensors.torch import load_file

from tests.processes import ROOT, run_ranks

CONFIG = ROOT / "examples" / "quickstart" / "fipo.yaml"


def arguments(data, output, *overrides):
    """Arguments of ``fipo_megatron.train`` for five short steps on the data of the quickstart."""
    return [
        str(CONFIG),
        *(f"model.path={data}/model", f"data.files=[{data}/problems.jsonl]", f"run.output={output}"),
        *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
        *("run.steps=5", "run.evaluate_every=0", "rollout.embedded_slots=32", "rollout.prompts_per_step=4"),
        *("rollout.samples_per_prompt=4", "actor.prompts_per_mini_batch=2", "rollout.max_response_tokens=24"),
        *overrides,
    ]


def command(data, output, *overrides, ranks=1):
    """Returns the command line of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "fipo_megatron.train", *arguments(data, output, *overrides)]


def train(data, output, *overrides, ranks=None, fail_at="", code=0, environment=None):
    """Trains in forked ranks; returns what they print, and checks the exit code."""
    variables = {"FIPO_FAIL_AT": fail_at, **(environment or {})}
    done = run_ranks("fipo_megatron.train", arguments(data, output, *overrides), ranks=ranks, environment=variables)
    assert done.code == code, done.output[-6000:]
    return done.output


def train_by_command(data, output, *overrides, ranks=1, code=0, environment=None, timeout=300):
    """Trains by the command line, under torchrun if there are several ranks; otherwise as :func:`train`."""
    done = subprocess.run(
        command(data, output, *overrides, ranks=ranks),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
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
