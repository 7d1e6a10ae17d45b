"""The metrics, timings, trajectories and configuration that a run writes: the documented ones and no others."""

import gzip
import json
from collections import Counter

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.quickstart import task
from fipo_megatron.observe import metrics as registry
from tests.runs import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

FAILED = tuple(f"{when}, {registry.FAILED}" for when in (registry.SAMPLED, registry.EVALUATED))
ABSENT = (
    *(
        registry.KL,
        registry.IMPORTANCE,
        registry.PEAK,
        registry.PROBED,
        registry.BASELINE,
        registry.SMALLER,
        registry.MOMENTS,
    ),
    *(f"{registry.SAMPLED}, {registry.DROPPED}", f"{registry.HEALTH}, {registry.LOST}"),
    *(f"{registry.EVALUATED}, {registry.VOTED}", *FAILED),
)
"""Conditions of tags that do not hold in the run below."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data of conftest.py with few held-out problems."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    held_out = directory / "held_out.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:16]))
    return directory


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    evaluation = ["run.evaluate_every=2", f"evaluation.files=[{data}/held_out.jsonl]"]
    settings = ["run.steps=3", "checkpoint.save_every=1", "run.noise_floor_every=1", "observe.trajectory_tokens=true"]
    train(data, output, *evaluation, *settings, "run.profile=[1]")
    return output


@pytest.fixture(scope="module")
def events(run):
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    return found


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def documented(entries):
    return {entry.tag.replace("{data_set}", "held_out") for entry in entries if entry.when not in ABSENT}


def test_the_tags_are_the_documented_ones(events):
    assert set(events.Tags()["scalars"]) == documented(registry.METRICS)
    assert set(events.Tags()["histograms"]) == documented(registry.HISTOGRAMS)
    assert set(events.Tags()["tensors"]) == {f"{tag}/text_summary" for tag in documented(registry.TEXTS)}


def test_files_hold_the_values_of_tensorboard(run, events):
    seen = 0
    for name in ("metrics", "evaluation", "timing"):
        for row in rows(run / f"{name}.jsonl"):
            for tag, value in row.items():
                if tag != "step" and value is not None:
                    (event,) = [one for one in events.Scalars(tag) if one.step == row["step"]]
                    assert event.value == pytest.approx(value, rel=1e-6)
                    seen += 1
    assert seen == sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])


def test_a_profile_names_the_parts_of_its_step(run):
    assert [file.name for file in (run / "profile").iterdir()] == ["step-000001-rank-0000.json.gz"]
    with gzip.open(run / "profile" / "step-000001-rank-0000.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    names = Counter(event["name"] for event in events)
    updates = rows(run / "metrics.jsonl")[1]["optimizer/updates"]
    assert names["optimizer_step"] == updates == 2
    # The log-prob pass of the second mini-batch, the two passes of the noise floor on the first, and the updates.
    assert names["pack"] == names["forward"] == names["token_log_probs"] == updates - 1 + 2 + updates
    assert names["policy_loss"] == updates + 1
    seconds = rows(run / "timing.jsonl")[1]
    for part in ("sync", "generate", "log_probs", "update"):
        (found,) = [event for event in events if event["name"] == part]
        assert 0 < found["dur"] / 1e6 <= seconds[f"time/{part}"] + 1e-3
    # The engine samples in a thread of its own.
    assert len({event["tid"] for event in events if event["name"] == "aten::mm"}) == 2


def test_the_parts_of_a_step_add_up(run):
    for row in rows(run / "timing.jsonl"):
        parts = [value for tag, value in row.items() if tag.startswith("time/")]
        whole = row["time/step"]
        assert sum(parts) - whole - row["time/reward"] == pytest.approx(whole, abs=1e-3)


def test_time_outside_of_steps_is_written(run):
    found = rows(run / "phases.jsonl")
    steps = len(rows(run / "metrics.jsonl"))
    assert [(row["phase"], row["step"]) for row in found] == [("start", 0), ("evaluate", steps), ("export", steps)]
    assert all(row["seconds"] > 0 for row in found)


def test_the_configuration_is_written(run, data):
    described = yaml.safe_load((run / "config.yaml").read_text())
    assert described["model"]["path"] == f"{data}/model"
    assert described["observe"]["trajectory_tokens"] is True


def test_responses_are_kept_with_their_tokens(run):
    found = rows(run / "trajectories" / "from-000000.jsonl")
    assert {row["step"] for row in found} == {0, 1, 2}
    assert {row["accuracy"] for row in found} == {0, 1}
    for row in found:
        tokens = row["tokens"]
        assert {len(column) for column in tokens.values()} == {row["response_tokens"]}
        if "\ufffd" not in "".join(tokens["text"]):  # a character of several tokens
            assert "".join(tokens["text"]) == row["response"]
        if row["mini_batch"] == 0:
            assert set(tokens["shift"]) == {0.0}, "the first update begins with π_θ = π_old"
    assert any(shift for row in found if row["mini_batch"] == 1 for shift in row["tokens"]["shift"])
