"""Disk space of a run against the rule that keeps checkpoints."""

import json
from pathlib import Path

import pytest

from fipo_megatron.checkpoint.disk_space import DiskSpace, checkpoint_bytes, export_bytes
from fipo_megatron.checkpoint.retention import steps_to_keep
from fipo_megatron.config import load_config
from fipo_megatron.weights.architecture import Architecture

ROOT = Path(__file__).parents[2]
MODEL = Architecture.from_hf(json.loads((ROOT / "tests/weights/configs/Qwen2.5-32B.json").read_text()))
RECIPE = str(ROOT / "examples/configs/fipo_qwen2.5_32b.yaml")


def space(*overrides):
    return DiskSpace.of_run(load_config(RECIPE, list(overrides)), MODEL)


def test_bytes_of_a_checkpoint():
    """32,763,876,352 parameters: 2 + 12 bytes each, as docs/checkpoints.md says (about 460 GB)."""
    assert checkpoint_bytes(MODEL, "bfloat16") == 14 * 32_763_876_352
    assert checkpoint_bytes(MODEL, "float32") == 16 * 32_763_876_352
    assert export_bytes(MODEL, "bfloat16") == 2 * 32_763_876_352


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("best", [True, False])
def test_kept_checkpoints_are_those_of_the_rule(last, best):
    """The first saved checkpoint is the best one, and the safe step lies far behind: nothing coincides."""
    kept, most = set(), 0
    for step in range(10, 401, 10):
        kept.add(step)  # the new one exists beside those that are removed after it
        most = max(most, len(kept))
        kept = steps_to_keep(sorted(kept), last, {10: 1.0} if best else {}, max(0, step - 95) or None)
    overrides = ["run.steps=400", "checkpoint.save_every=10", f"checkpoint.keep_last={last}"]
    overrides += [f"checkpoint.keep_best={str(best).lower()}", "run.evaluate_every=10"]
    assert space(*overrides).kept_checkpoints == most


def test_space_of_a_run():
    found = space("run.steps=100", "checkpoint.save_every=60", "checkpoint.export_every=50", "health.action=off")
    assert found.kept_checkpoints == 2  # steps 60 and 100
    assert found.exports == 2  # step 50, and the final one
    assert found.sent_weights == 0
    assert found.total == 2 * found.checkpoint + 2 * found.export + found.trajectories
    assert space("rollout.servers.sync=disk").sent_weights == 2 * found.export
    assert space("checkpoint.save_every=0").kept_checkpoints == 1
