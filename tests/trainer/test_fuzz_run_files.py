"""Each small file of a finished run, mutated at random: the run opens with the newest checkpoint that is whole."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.storage import checksums
from tests.trainer.test_factory import open_

MUTATIONS = int(os.environ.get("FIPO_RUN_FILE_MUTATIONS", "30"))
SMALL = 100_000
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def finished(recorded, tmp_path_factory):
    """The recorded run, with the files of evaluations, an alarm and a rollback before its first checkpoint."""
    run = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(recorded, run, ignore=shutil.ignore_patterns("hf", "rollouts", "tensorboard", "rollout"))
    for checkpoint in (run / "checkpoints").iterdir():
        manifest = checkpoint / "run" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rollbacks": 1}))
        checksums.write(checkpoint, checksums.compute(checkpoint, checksums.read(checkpoint)))
    (run / "evaluations").mkdir()
    for step in (0, 2, 4):
        (run / "evaluations" / f"step-{step:06}.jsonl").write_text(lines({"data_set": "one", "id": "1", "right": 2}))
    evaluations = [{"step": step, "evaluation/accuracy": 0.5, "evaluation/response_tokens": 9.0} for step in (0, 2, 4)]
    (run / "evaluation.jsonl").write_text(lines(*evaluations))
    (run / "alarms.jsonl").write_text(lines({"step": 1, "began": 0, "action": "warn", "reason": "short"}))
    rollback = {"number": 1, "step": 1, "to": 0, "cursor": 8, "learning_rate_factor": 0.5, "reason": "short"}
    (run / "roll_backs.jsonl").write_text(lines(rollback))
    (run / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    return run


def small_files(run):
    return sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size < SMALL)


def flip(file, random):
    content = bytearray(file.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    file.write_bytes(content)


def truncate(file, random):
    file.write_bytes(file.read_bytes()[: random.integers(file.stat().st_size)])


def delete(file, random):
    file.unlink()


def replace(file, random):
    file.unlink()
    kind = random.integers(3)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        file.symlink_to(file.with_name("nowhere"))
    else:
        file.write_text(random.choice(["[]", "{}", "null", '"text"', "1e999", "[" * 100_000, "\n\n", "\x00" * 64]))


def add(file, random):
    content = file.read_bytes()
    at = random.choice([0, len(content), random.integers(len(content) + 1)])
    added = random.choice([b"\xff\xfe", b"\n", b"{}\n", b'{"step": "3"}\n', random.bytes(9), b'{"step": 3'])
    file.write_bytes(content[:at] + bytes(added) + content[at:])


def whole_steps(run, pristine):
    """Returns the steps of the checkpoints whose files and checksums are the original ones."""
    steps = []
    for original in sorted((pristine / "checkpoints").iterdir()):
        copy = run / "checkpoints" / original.name
        try:
            found = json.loads((copy / checksums.FILE).read_text())
        except (OSError, ValueError, RecursionError):
            continue
        sums = checksums.read(original)
        if found == sums and not checksums.problems(copy):
            steps.append(int(original.name.removeprefix("step-")))
    return steps


def opened_step(data, run):
    with open_(data, run, "checkpoint.save_every=2") as trainer:
        assert trainer.log.evaluations().keys() <= {0, 2, 4}
        trainer.log.seen()
        return trainer.step


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_a_mutated_file_never_costs_a_whole_checkpoint(seed, data, finished, tmp_path):
    random = np.random.default_rng(seed)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    files = small_files(run)
    # Half of all mutations hit the files of the run, of which there are fewer than files of checkpoints.
    of_run = [file for file in files if (run / "checkpoints") not in file.parents]
    file = random.choice(of_run if seed % 2 else files)
    mutate = random.choice([flip, flip, truncate, delete, replace, add])
    mutate(Path(file), random)
    where = f"seed {seed}: {mutate.__name__} {file}"
    whole = whole_steps(run, finished)
    assert opened_step(data, run) == max(whole), where
    assert {f"step-{step:06}" for step in whole} <= {path.name for path in (run / "checkpoints").iterdir()}, where
    for name in ("metrics.jsonl", "timing.jsonl", "alarms.jsonl", "roll_backs.jsonl"):
        if (run / name).exists():
            rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
            assert all(row["step"] < max(whole) for row in rows), where


def test_foreign_files_are_left_alone(data, finished, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "trajectories" / "from-here.jsonl").write_text("mine")
    (run / "evaluations" / "step-one.jsonl").write_text("mine")
    (run / "evaluations" / ".x.partial").mkdir()
    checkpoints = run / "checkpoints"
    (checkpoints / ".x.partial").write_text("mine")
    (checkpoints / ".y.partial").symlink_to(tmp_path)
    (checkpoints / "step-000009").write_text("a file")
    (checkpoints / "step-000010").symlink_to("nowhere")
    (checkpoints / ".step-000006.partial").write_text("a file")
    (checkpoints / ".step-000007.partial").mkdir()
    (checkpoints / ".step-000008.partial").symlink_to(tmp_path)
    (run / ".metrics.jsonl.partial").symlink_to(tmp_path / "elsewhere")
    assert opened_step(data, run) == 5
    assert (run / "trajectories" / "from-here.jsonl").read_text() == "mine"
    assert (run / "evaluations" / "step-one.jsonl").read_text() == "mine"
    assert (run / "evaluations" / ".x.partial").is_dir()
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {
        *("step-000002", "step-000004", "step-000005", ".x.partial", ".y.partial"),
        *("damaged-step-000009-0", "damaged-step-000010-0"),
    }
    assert tmp_path.is_dir()
    assert not (tmp_path / "elsewhere").exists()
    assert ".x.partial: is no checkpoint of this run; left as it is" in caplog.text


def test_a_file_and_its_checksum_both_gone_mean_the_checkpoint_before(data, finished, tmp_path):
    for lost in ("run/manifest.json", "run/random-0.pt", "run/sampler-0.npz", "common.pt", "__0_0.distcp"):
        run = tmp_path / lost.replace("/", "-")
        shutil.copytree(finished, run)
        newest = run / "checkpoints" / "step-000005"
        (newest / lost).unlink()
        sums = checksums.read(newest)
        checksums.write(newest, {name: text for name, text in sums.items() if name != lost})
        assert opened_step(data, run) == 4, lost


def test_a_manifest_is_not_believed_before_its_checksum(data, finished, tmp_path):
    changes = [
        ("architecture", "hidden", 4096),
        ("config", "checkpoint", []),
        (None, "rollbacks", 0),
        (None, "step", []),
    ]
    for number, (section, key, value) in enumerate(changes):
        run = tmp_path / str(number)
        shutil.copytree(finished, run)
        manifest = run / "checkpoints" / "step-000005" / "run" / "manifest.json"
        values = json.loads(manifest.read_text())
        changed = values if section is None else values[section]
        assert key in changed
        changed[key] = value
        manifest.write_text(json.dumps(values))
        assert opened_step(data, run) == 4, key


@pytest.mark.parametrize("change", ["swapped", "cut"])
def test_changed_data_are_named(change, data, finished, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "run")
    rows = (data / "problems.jsonl").read_text().splitlines(keepends=True)
    changed = [rows[1], rows[0], *rows[2:]] if change == "swapped" else rows[:-1]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(rows))
    settings = ["checkpoint.save_every=2", f"data.files=[{file}]"]
    with open_(data, tmp_path / "run", *settings) as trainer:
        trainer.step += 1
        trainer.save()
    with open_(data, tmp_path / "run", *settings):
        assert "has changed since" not in caplog.text
    file.write_text("".join(changed))
    with open_(data, tmp_path / "run", *settings) as trainer:
        assert trainer.step == 6
    assert f"{file}: has changed since {tmp_path}/run/checkpoints/step-000006 was saved" in caplog.text


def test_lost_rows_of_metrics_are_told(data, finished, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    rows = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([rows[0], rows[1][:50], *rows[2:]]))
    assert opened_step(data, run) == 5
    assert (
        "metrics.jsonl: row 2 is not JSON; set aside in damaged-metrics.jsonl-0, the other rows are used" in caplog.text
    )
    assert "metrics.jsonl: has no row of step 1; the collapse alarm resumes without them" in caplog.text
    assert (run / "damaged-metrics.jsonl-0").read_bytes() == rows[1][:50] + b"\n"
