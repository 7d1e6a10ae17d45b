"""Rows of roll_backs.jsonl that cannot be used are set aside, and no row renames a checkpoint that is in use."""

import json
from dataclasses import replace

import pytest

from fipo_megatron.checkpoint import manifest
from fipo_megatron.storage import checksums
from fipo_megatron.trainer import rollback_record
from fipo_megatron.trainer.rollback_record import Rollback
from tests.checkpoint.test_manifest import MANIFEST

EVENT = Rollback(number=1, step=7, to=4, cursor=64, learning_rate_factor=0.5, reason="short")


def checkpoints(directory, rollbacks):
    """Writes checkpoints of manifests alone: the number of rollbacks by step."""
    for step, number in rollbacks.items():
        path = directory / manifest.name_of(step)
        (path / "run").mkdir(parents=True)
        replace(MANIFEST, step=step, rollbacks=number).write(path)
        checksums.write(path, checksums.compute(path, [manifest.FILE]))
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        *({"number": 0}, {"number": "1"}, {"to": None}, {"to": 8}, {"cursor": 1.5}, {"learning_rate_factor": -1}),
        *({"learning_rate_factor": "x"}, {"reason": 3}, {"reasom": "short"}),
    ],
)
def test_a_row_that_is_no_rollback_is_set_aside(change, tmp_path, caplog):
    rollback_record.write(tmp_path, [EVENT, replace(EVENT, number=2)])
    file = tmp_path / rollback_record.FILE
    first, second = file.read_text().splitlines()
    file.write_text(json.dumps(json.loads(first) | change) + "\n" + second + "\n" + second[:40])
    assert rollback_record.read(tmp_path) == [replace(EVENT, number=2)]
    rollback_record.set_bad_rows_aside(tmp_path)
    assert file.read_text() == second + "\n"
    assert len(caplog.records) == 1
    assert rollback_record.done(rollback_record.read(tmp_path), 1) == []


def test_checkpoints_after_a_rollback_are_renamed_until_a_later_one_is_saved(tmp_path):
    found = checkpoints(tmp_path / "a", {2: 0, 4: 0, 6: 0})
    rollback_record.set_aside_collapsed(found, [EVENT])
    assert names(found) == ["collapsed-step-000006-0", "step-000002", "step-000004"]
    checkpoints(found, {8: 1})
    rollback_record.set_aside_collapsed(found, [replace(EVENT, to=2)])
    assert names(found) == ["collapsed-step-000006-0", "step-000002", "step-000004", "step-000008"]


def test_a_damaged_row_or_manifest_renames_nothing(tmp_path):
    found = checkpoints(tmp_path / "a", {2: 0, 4: 0})
    rollback_record.set_aside_collapsed(found, [replace(EVENT, to=1)])
    later = checkpoints(found, {6: 1}) / "step-000006" / manifest.FILE
    later.write_text(later.read_text().replace('"rollbacks": 1', '"rollbacks": 0'))
    rollback_record.set_aside_collapsed(found, [EVENT])
    assert names(found) == ["step-000002", "step-000004", "step-000006"]
