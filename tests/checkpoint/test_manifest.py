"""Manifests: what is written is read again, also if an earlier version wrote it."""

import importlib.metadata
import json
import re
from dataclasses import replace

import pytest

from fipo_megatron.checkpoint.manifest import FILE, FORMAT, Manifest, differences, package_versions
from fipo_megatron.config import Config, as_dict
from fipo_megatron.config.actor_sections import SftConfig
from fipo_megatron.storage import checksums

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
    assert found == replace(MANIFEST, config=MANIFEST.config | {"sft": {"examples_per_step": 512}})
    now, defaults = as_dict(Config(sft=SftConfig(max_skipped_updates=7))), as_dict(Config())
    assert differences(found.config, defaults, defaults) == []
    assert differences(found.config, now, defaults) == ["sft.max_skipped_updates: 5 → 7"]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "20"}, "step = '20': expected int"),
        ({"step": True}, "step = True: expected int"),
        ({"step": 1.5}, "step = 1.5: expected int"),
        ({"cursor": -1}, "cursor = -1: expected a number of at least 0"),
        ({"cursor": 1 << 70}, "cursor = 1180591620717411303424: expected a number"),
        ({"world_size": 0}, "world_size and learning_rate_factor must be"),
        ({"learning_rate_factor": float("nan")}, "learning_rate_factor = nan: expected a number"),
        ({"prefetched": 1}, "prefetched = 1: expected bool"),
        ({"parallel": []}, r"parallel = \[\]: expected dict"),
        ({"config": {}}, "config.checkpoint.optimizer_sharding = None: expected fully_reshardable or dp_reshardable"),
        ({"config": {"checkpoint": []}}, "config.checkpoint.optimizer_sharding = None"),
        ({"stfp": 20}, "has unknown keys: stfp"),
        ({"step": None}, "step = None: expected int"),
        ({"format": 1, "config": {}}, "is not a manifest of format 1: KeyError"),
        ({"format": 1, "config": []}, "is not a manifest of format 1: AttributeError"),
        ({"format": "2"}, "has format 2, expected 2"),
    ],
)
def test_wrong_values_are_named_in_one_sentence(checkpoint, change, message):
    MANIFEST.write(checkpoint)
    values = json.loads((checkpoint / FILE).read_text())
    (checkpoint / FILE).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message) as error:
        Manifest.read(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", '"step"', "[" * 100_000, "\ufeff{}"])
def test_other_json_is_no_manifest(checkpoint, content):
    (checkpoint / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"expected an object|cannot be read"):
        Manifest.read(checkpoint)


def test_a_missing_key_is_named(checkpoint):
    MANIFEST.write(checkpoint)
    values = json.loads((checkpoint / FILE).read_text())
    del values["schedule"]
    (checkpoint / FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has no schedule"):
        Manifest.read(checkpoint)


def test_the_checksum_is_compared_before_the_manifest_is_believed(checkpoint):
    MANIFEST.write(checkpoint)
    with pytest.raises(ValueError, match=r"missing in checksums\.json"):
        Manifest.read_verified(checkpoint)
    checksums.write(checkpoint, checksums.compute(checkpoint, [FILE]))
    assert Manifest.read_verified(checkpoint) == MANIFEST
    (checkpoint / FILE).write_text((checkpoint / FILE).read_text().replace('"layers": 2', '"layers": 3'))
    with pytest.raises(ValueError, match="corrupt: its SHA-256"):
        Manifest.read_verified(checkpoint)
    for content in ("[]", "{", '{"run/manifest.json": 1}'):
        (checkpoint / checksums.FILE).write_text(content)
        with pytest.raises(ValueError, match=r"checksums\.json"):
            Manifest.read_verified(checkpoint)


def test_a_checkout_that_is_not_installed_has_versions_of_the_rest(monkeypatch):
    """Seen on a GPU machine: the package came as a source tree, and the first checkpoint ended the run."""
    installed = importlib.metadata.version

    def version(name):
        if name == "fipo-megatron":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = package_versions()
    assert found.pop("fipo-megatron") == "not installed"
    assert all(re.match(r"\d+\.", each) for each in found.values())
