"""The embedded engine follows the actor in every layout: its log-probs are those of the actor."""

import json

import pytest
from pydantic import TypeAdapter

from fipo_megatron.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
)
from tests.actor.models import random_model
from tests.distributed.launch import on_ranks
from tests.distributed.session_worker import LAYOUTS

pytestmark = pytest.mark.distributed


def config_of(path, **rollout):
    return Config(
        model=ModelConfig(str(path)),
        algorithm=AlgorithmConfig(allow_inert=True),
        data=DataConfig(max_prompt_tokens=16),
        actor=ActorConfig(
            prompts_per_mini_batch=4,
            token_budget=256,
            dtype="float32",
            distributed_optimizer=False,
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=0),
        ),
        rollout=RolloutConfig(
            **(
                {"engine": "embedded", "prompts_per_step": 4, "samples_per_prompt": 2, "max_response_tokens": 24}
                | rollout
            )
        ),
        reward=RewardConfig(overlong_buffer_tokens=0),
    )


def test_the_embedded_engine_follows_the_actor(tmp_path):
    model = tmp_path / "model"
    random_model("qwen3", 0, max_position_embeddings=256, eos_token_id=1).save_pretrained(model)
    config = TypeAdapter(Config).dump_json(config_of(model)).decode()
    on_ranks("tests.distributed.session_worker", 2, config, str(tmp_path))
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in LAYOUTS}
    for steps in found.values():
        assert [step["versions"] for step in steps] == [[0], [1], [2]]
        assert all(step["mismatch"] < 1e-4 for step in steps)
        assert all(found == sampled > 0 for found, sampled in (step["tokens"] for step in steps)), "each token once"
        assert all(step["grad_norm"] > 0 for step in steps)
        # The same responses at first, and so the same gradient, however the actor is split.
        assert steps[0]["grad_norm"] == pytest.approx(found["TP2"][0]["grad_norm"], rel=1e-3)
    assert not list(tmp_path.glob("version-*"))
