"""Manifests: what is written is read again, also if an earlier version wrote it."""

import json

import pytest

from fipo_megatron.checkpoint.manifest import FILE, FORMAT, Manifest, differences
from fipo_megatron.config import Config, as_dict

MANIFEST = Manifest(
    step=20,
    cursor=640,
    leaders=1,
    world_size=2,
    parallel={"tensor_parallel": 2},
    schedule={"num_steps": 80},
    skipped_steps=1,
    architecture={"layers": 2, "mixture": {"experts": 8, "top_k": 2}},
    config=as_dict(Config()),
    packages={"torch": "2.13.0"},
    prefetched=True,
    rollbacks=1,
    learning_rate_factor=0.5,
)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path


def as_format_1(manifest):
    """Returns the content of the file that the program wrote before version 0.1.0."""
    values = json.loads(json.dumps(manifest.__dict__))
    config = values["config"]
    config["run"] |= config.pop("checkpoint")
    del config["sft"]
    values["architecture"]["mixture"] = {"experts": 8, "chosen": 2}
    values["sampled_ahead"] = values.pop("prefetched")
    values["roll_backs"] = values.pop("rollbacks")
    return values | {"format": 1}


def test_written_manifest_is_read_again(checkpoint):
    MANIFEST.write(checkpoint)
    assert Manifest.read(checkpoint) == MANIFEST


def test_format_1_is_read_under_the_names_of_today(checkpoint):
    values = as_format_1(MANIFEST)
    assert "save_every" in values["config"]["run"]
    (checkpoint / FILE).write_text(json.dumps(values))
    found = Manifest.read(checkpoint)
    assert found == MANIFEST
    assert not differences(found.config, as_dict(Config()))


def test_format_1_of_an_sft_run_keeps_its_batch(checkpoint):
    values = as_format_1(MANIFEST)
    values["config"]["algorithm"]["kind"] = "sft"
    values["config"]["rollout"]["prompts_per_step"] = 192
    (checkpoint / FILE).write_text(json.dumps(values))
    assert Manifest.read(checkpoint).config["sft"] == {"examples_per_step": 192}


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ('{"format": 3}', "has format 3, expected")])
def test_unreadable_manifest_is_named(checkpoint, content, message):
    (checkpoint / FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        Manifest.read(checkpoint)
    assert FORMAT == 2
