"""Weights and optimizer saved under one layout and loaded under each: exact under the same, else to rounding."""

import json

import pytest
from pydantic import TypeAdapter

from fipo_megatron.config import Config
from tests.actor.models import random_model
from tests.distributed.launch import on_ranks
from tests.distributed.test_session import config_of
from tests.distributed.training_state_worker import KINDS, LAYOUTS

pytestmark = pytest.mark.distributed


def test_the_next_updates_are_those_of_a_run_that_was_never_saved(tmp_path):
    """Compares exactly under the same layout, else to 1e-5, or 5e-2 in bfloat16."""
    random_model("qwen3", 0, max_position_embeddings=256, eos_token_id=1).save_pretrained(tmp_path / "model")
    config = TypeAdapter(Config).dump_json(config_of(tmp_path / "model")).decode()
    on_ranks("tests.distributed.training_state_worker", 2, config, str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(KINDS) * len(LAYOUTS) ** 2 + len(LAYOUTS)
    for one in results:
        if one["saved"] == one["loaded"]:
            assert one["found"] == one["expected"], one
            continue
        tolerance = 1e-5 if one["kind"].startswith("float32") else 5e-2
        for found, expected in zip(one["found"], one["expected"], strict=True):
            assert found == pytest.approx(expected, rel=tolerance, abs=tolerance / 10), one
