"""A checkpoint from elsewhere whose checksums are right: it runs no code, and means the checkpoint before it."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from fipo_megatron.storage import checksums
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.hf_directory import WeightsError
from tests.runs import train
from tests.trainer.test_factory import open_

pytestmark = pytest.mark.distributed

SETTINGS = (
    "actor.distributed_optimizer=true",
    "checkpoint.optimizer_sharding=dp_reshardable",
    "checkpoint.save_every=2",
)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "reshardable"
    train(data, output, *SETTINGS)
    return output


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def seal(checkpoint):
    """Writes the checksums of the files as they are now."""
    checksums.write(checkpoint, checksums.compute(checkpoint, checksums.read(checkpoint)))


def in_optimizer_object(checkpoint, marker):
    """Appends a pickle to a part, and lets the metadata say that it is the object."""
    metadata = pickle.loads((checkpoint / torch_dist.METADATA).read_bytes())
    named = metadata.state_dict_metadata.items()
    objects = [key for key, kind in named if isinstance(kind, BytesStorageMetadata) and "optimizer" in key]
    assert objects, "dp_reshardable saves byte objects"
    for index, info in metadata.storage_data.items():
        if index.fqn in objects:
            content = io.BytesIO()
            torch.save([Attack(marker)], content)
            part = checkpoint / info.relative_path
            info.offset, info.length = part.stat().st_size, len(content.getvalue())
            with part.open("ab") as file:
                file.write(content.getvalue())
    (checkpoint / torch_dist.METADATA).write_bytes(pickle.dumps(metadata))


def in_random_states(checkpoint, marker):
    torch.save({"torch": Attack(marker)}, checkpoint / "run" / "random-0.pt")


def in_sampler(checkpoint, marker):
    with (checkpoint / "run" / "sampler-0.npz").open("wb") as file:
        np.savez(file, records=np.array([Attack(marker)], dtype=object))


def in_common(checkpoint, marker):
    torch.save({"content_metadata": Attack(marker)}, checkpoint / torch_dist.COMMON)


def in_metadata(checkpoint, marker):
    (checkpoint / torch_dist.METADATA).write_bytes(pickle.dumps(Attack(marker)))


@pytest.mark.parametrize("attack", [in_optimizer_object, in_random_states, in_sampler, in_common, in_metadata])
def test_a_pickle_in_a_checkpoint_is_refused_and_the_checkpoint_before_is_used(attack, data, run, tmp_path, caplog):
    marker, checkpoint = tmp_path / "executed", run / "checkpoints" / "step-000005"
    attack(checkpoint, marker)
    seal(checkpoint)
    with open_(data, run, *SETTINGS) as trainer:
        assert trainer.step == 4
    assert not marker.exists()
    assert (run / "checkpoints" / "damaged-step-000005-0").is_dir()
    (text,) = [record.getMessage() for record in caplog.records if "IS DAMAGED" in record.getMessage()]
    assert len(text.splitlines()) == 2, text


def test_the_attack_works_on_a_loader_that_trusts(tmp_path):
    torch.save([Attack(tmp_path / "executed")], tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["random-0.pt", "sampler-0.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", "archive"])
def test_files_of_a_rank_that_are_no_archives_mean_the_checkpoint_before(file, content, data, run):
    path = run / "checkpoints" / "step-000005" / "run" / file
    if content == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("records.npy", b"nothing")
    else:
        path.write_bytes(content)
    seal(path.parents[1])
    with open_(data, run, *SETTINGS) as trainer:
        assert trainer.step == 4


def test_without_a_checkpoint_that_can_be_loaded_the_run_ends(data, run):
    for checkpoint in (run / "checkpoints").iterdir():
        manifest = checkpoint / "run" / "manifest.json"
        values = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(values | {"schedule": {}}))
        seal(checkpoint)
    with pytest.raises(WeightsError, match=r"no checkpoint can be loaded.*\n.*KeyError"):
        open_(data, run, *SETTINGS)
    assert len(list((run / "checkpoints").glob("damaged-step-*"))) == 3
