"""A tiny model and the configuration of a run with it."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.sglang import models

SETTINGS = {
    "data": {"chat_template": "none", "max_prompt_tokens": 16},
    "rollout": {
        "engine": "embedded",
        "embedded_slots": 16,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "max_response_tokens": 64,
    },
    "reward": {"overlong_buffer_tokens": 0},
    "actor": {
        "prompts_per_mini_batch": 2,
        "token_budget": 128,
        "dtype": "float32",
        "distributed_optimizer": False,
        "log_prob_chunk_tokens": 128,
    },
}


def write_run(directory: Path) -> Path:
    """Saves the model and writes ``run.yaml``; returns its path."""
    model = models.save(directory / "model")
    path = directory / "run.yaml"
    settings = SETTINGS | {"model": {"path": str(model)}, "run": {"output": str(directory / "run")}}
    path.write_text(yaml.safe_dump(settings))
    return path
