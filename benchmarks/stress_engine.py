"""``fipo stress`` from end to end with a real SGLang server on this machine's CPU: eight long responses at once.

A random Qwen3 of one layer with a context of 131,072 tokens. SGLang needs its environment (``make sglang-env``).

    python -m benchmarks.stress_engine [LENGTH …]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.result_table import write_result
from tests.actor.models import random_model
from tests.sglang import models

ROOT = Path(__file__).parents[1]
LENGTHS = (16_448,)
"""16,384 tokens per response, after a prompt of 64."""
SHAPE = {
    "vocab_size": models.VOCAB,
    "max_position_embeddings": 131_072,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SETTINGS = {
    "data": {"max_prompt_tokens": 64, "chat_template": "none"},
    "rollout": {
        "engine": "sglang",
        "prompts_per_step": 16,
        "samples_per_prompt": 8,
        "max_response_tokens": 64,
        "servers": {
            "python": os.environ.get("SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python")),
            "environment": {"OMP_NUM_THREADS": "1"},
        },
        "sglang": {"max_total_tokens": 140_000},
    },
    "reward": {"overlong_buffer_tokens": 0},
    "actor": {"prompts_per_mini_batch": 4, "token_budget": 4096, "dtype": "float32", "distributed_optimizer": False},
}


def main(lengths: tuple[int, ...]) -> int:
    directory = ROOT / "build" / "stress"
    model = models.save(directory / "model")
    random_model("qwen3", **SHAPE, eos_token_id=1, pad_token_id=0).save_pretrained(model)
    config = directory / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | {"model": {"path": str(model)}}))
    command = [sys.executable, "-m", "fipo_megatron.cli", "stress", str(config)]
    options = ["--lengths", ",".join(map(str, lengths)), "--output", str(directory)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    code = subprocess.run([*command, *options], env=os.environ | settings, check=False).returncode
    if code == 0:
        write_result("stress_engine", json.loads((directory / "stress.json").read_text()))
    return code


if __name__ == "__main__":
    sys.exit(main(tuple(map(int, sys.argv[1:])) or LENGTHS))
