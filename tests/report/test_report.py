"""The report without a browser: verdicts, thinning, bad input, embedded data."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.observe.metrics import METRICS
from fipo_megatron.report.__main__ import main
from fipo_megatron.report.charts import CHARTS, charts_of, held_out
from fipo_megatron.report.frame import escaped_json
from fipo_megatron.report.page import page_data, render
from fipo_megatron.report.picture import draw
from fipo_megatron.report.runs import Alarm, RunError, Series, differences, read_alarms, read_runs, rows
from fipo_megatron.report.series import smoothed, thin, thin_together
from fipo_megatron.report.summary import headline
from fipo_megatron.report.tokens import chosen_responses
from fipo_megatron.report.verdict import collapse, compare, training_fall
from tests.report.report_runs import HOSTILE, make_run, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A healthy run, one that is as good, and one that collapses at step 41."""
    base = tmp_path_factory.mktemp("runs")
    make_run(base / "good", seed=1)
    make_run(base / "same", seed=3)
    make_run(base / "broken", seed=2, lr=1e-3, collapse=41, alarm=52)
    return base


def read(base, *names):
    return read_runs([base / name for name in names])


def test_charts_show_tags_of_the_registry_alone():
    tags = {metric.tag for metric in METRICS}
    shown = [chart.tags for chart in (*CHARTS, *held_out("{data_set}", several=False))]
    assert {tag for part in shown for tag in part} <= tags


def test_verdict_names_the_better_run_and_the_reason(runs):
    found = compare(read(runs, "good", "broken"))
    assert (found.leader, found.equals) == (0, (0,))
    assert found.sentences[0].startswith("good is best: ")
    assert found.sentences[1].startswith("broken is ")
    assert "policy KL rose" in found.sentences[1]
    assert any("alarm at step 52" in text for text in found.sentences)
    fall = collapse(read(runs, "broken")[0])
    assert fall is not None
    assert 41 <= fall.step <= 46


def test_returns_are_alarms(tmp_path):
    write(tmp_path / "roll_backs.jsonl", [{"number": 1, "step": 9, "to": 6, "reason": "the length fell"}])
    write(tmp_path / "alarms.jsonl", [{"step": 12, "action": "stop", "reason": "again"}])
    assert read_alarms(tmp_path) == [Alarm(9, "roll_back", "the length fell"), Alarm(12, "stop", "again")]


@pytest.mark.parametrize("order", [("good", "same"), ("same", "good")])
def test_overlapping_intervals_are_no_difference(runs, order):
    found = compare(read(runs, *order))
    assert found.equals == (0, 1)
    assert found.sentences[0].startswith("No clear difference")
    assert not any("best" in text or "below" in text for text in found.sentences)


def test_runs_of_different_lengths_are_compared_where_both_were_evaluated(runs, tmp_path):
    make_run(tmp_path / "short", steps=37, planned=80)
    found = compare(read_runs([runs / "good", tmp_path / "short"]))
    assert "at step 30" in found.sentences[0]
    assert "Compared at step 30" in found.sentences[-1]
    steps = headline(read_runs([tmp_path / "short"]))["rows"][0][2]
    assert steps[0] == "37 of 80"
    assert steps[1].startswith("running, or ended early")


def test_one_data_set_better_and_one_worse_is_no_clear_difference(tmp_path):
    row = {"evaluation/accuracy": 0.5}
    for name, first, second in (("a", 0.2, 0.8), ("b", 0.8, 0.3)):
        for run, value in (("x", first), ("y", second)):
            row_of = row | {
                f"evaluation/{name}/avg{end}": value + d for end, d in (("", 0), ("_low", -0.1), ("_high", 0.1))
            }
            file = tmp_path / run / "evaluation.jsonl"
            old = json.loads(file.read_text()) if file.is_file() else {}
            (tmp_path / run).mkdir(exist_ok=True)
            write(file, [{"step": 5} | old | row_of])
            write(tmp_path / run / "metrics.jsonl", [{"step": 4, "policy/loss": 1.0}])
    assert compare(read_runs([tmp_path / "x", tmp_path / "y"])).sentences[0].startswith("No clear difference")


def test_a_fall_in_training_that_held_out_accuracy_does_not_share_is_no_collapse(runs, tmp_path):
    path = make_run(tmp_path / "run", collapse=41)
    (path / "evaluation.jsonl").write_text((runs / "good" / "evaluation.jsonl").read_text())
    run = read_runs([path])[0]
    assert training_fall(run) is not None
    assert collapse(run) is None
    assert "held-out accuracy did not" in str(headline([run])["rows"])


def test_without_intervals_nothing_is_clear(tmp_path):
    for name, last in (("a", 0.9), ("b", 0.2)):
        write(tmp_path / name / "metrics.jsonl", [{"step": 0, "policy/loss": 1.0}])
        write(
            tmp_path / name / "evaluation.jsonl",
            [{"step": s, "evaluation/accuracy": v} for s, v in ((0, 0.1), (1, last))],
        )
    both = read_runs([tmp_path / "a", tmp_path / "b"])
    assert compare(both).sentences[0].endswith("there are no intervals to judge by (a 90.0 %, b 20.0 %).")
    assert compare(both[:1]).sentences[0].endswith("10.0 % at step 0 (there are no intervals).")


def test_noise_is_no_fall(tmp_path):
    draw_noise = np.random.default_rng(0).normal(0.5, 0.2, 300)
    write(tmp_path / "run" / "metrics.jsonl", [{"step": i, "rollout/accuracy": v} for i, v in enumerate(draw_noise)])
    assert training_fall(read_runs([tmp_path / "run"])[0]) is None


def test_thinning_keeps_means_and_extremes():
    values = np.sin(np.arange(500_000) / 1e4)
    values[123_456], values[400_001], values[7] = 9.0, -9.0, np.nan
    thinned = thin(Series(np.arange(500_000), values), 1500)
    assert thinned.extremes is not None
    low, high = thinned.extremes
    assert len(thinned.line) + len(low) + len(high) <= 1500
    assert (high.values.max(), low.values.min()) == (9.0, -9.0)
    assert np.all(np.diff(thinned.line.steps) > 0)
    np.testing.assert_allclose(thinned.line.values[5], values[5000:6000].mean())
    assert thin(Series(np.arange(9), values[:9]), 9).extremes is None
    parts = thin_together([Series(np.arange(10_001), np.full(10_001, float(i))) for i in (1, 2)], 100)
    assert [len(part) for part in parts] == [100, 100]
    assert all((part.values == i).all() for i, part in enumerate(parts, 1))


def test_smoothing_is_a_centred_mean_over_steps():
    series = Series(np.array([0, 1, 2, 3, 10]), np.array([0.0, 3.0, np.nan, 6.0, 1.0]))
    np.testing.assert_allclose(smoothed(series, 3), [1.5, 1.5, np.nan, 6.0, 1.0])
    assert smoothed(series, 1) is series.values


def test_long_runs_make_small_pages(tmp_path):
    with_tags = {"policy/entropy": 0.25, "time/generate": 1.5, "time/update": 0.5}
    write(tmp_path / "run" / "metrics.jsonl", [{"step": i} | with_tags for i in range(60_000)])
    page = render(read_runs([tmp_path / "run"]), smooth=1, responses=40, token_limit=100)
    assert len(page) < 250_000
    assert "Long curves (60,000 points) are thinned" in page


def test_responses_are_spread_over_steps_with_right_and_wrong_ones(runs):
    rows_shown, text = chosen_responses(read(runs, "good")[0], 40, 8)
    assert len(rows_shown) == 40
    assert {row["accuracy"] for row in rows_shown} == {0, 1}
    steps = [row["step"] for row in rows_shown]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 79)
    assert all(len(row["tokens"]["text"]) == 8 and row["cut"] for row in rows_shown if row["tokens"])
    assert "40 of 320 recorded responses" in text
    assert "are cut at 8 tokens" in text
    assert chosen_responses(read(runs, "good")[0], 0, 8)[0] == []


def test_configurations_that_differ(runs):
    assert differences(read(runs, "good", "broken")) == [("actor.optimizer.lr", ["0.0003", "0.001"])]
    assert differences(read(runs, "good", "same")) == []


def test_hostile_text_cannot_end_the_data(runs):
    page = render(read(runs, "good"), smooth=1, responses=200, token_limit=100)
    body = page.partition('id="data">')[2].partition("</script>")[0]
    assert HOSTILE in json.loads(body)["responses"][-1]["prompt"] + str(json.loads(body)["responses"])
    assert not set("<>&") & set(body)
    assert page.count("<img") == 0
    assert json.loads(escaped_json({"x": "\ud800</script>"})) == {"x": "\ud800</script>"}


def test_damaged_last_line_is_ignored_and_another_is_not(runs, tmp_path):
    path = make_run(tmp_path / "run", steps=12)
    before = read_runs([path])[0]
    for file in (path / "metrics.jsonl", path / "trajectories" / "from-000000.jsonl", path / "timing.jsonl"):
        file.write_text(file.read_text() + '{"step": 12, "policy/lo')
    after = read_runs([path])[0]
    assert after.steps == before.steps == 12
    np.testing.assert_equal(after.get("policy/loss").values, before.get("policy/loss").values)
    assert len(chosen_responses(after, 100, 10)[0]) == 48
    (path / "metrics.jsonl").write_text(
        '{"step": 0, "policy/loss": 1}\n{"step": 1, "pol\n{"step": 2, "policy/loss": 1}\n'
    )
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_runs([path])


def test_numbers_that_json_does_not_know(tmp_path):
    write(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "policy/loss": math.nan, "policy/entropy": math.inf}])
    run = read_runs([tmp_path / "run"])[0]
    assert np.isnan(run.get("policy/entropy").values).all()
    assert charts_of([run]) == []
    assert page_data([run], smooth=1, responses=1, token_limit=1)["charts"] == []


def test_rows_that_are_not_as_they_should_be(tmp_path):
    row = {"step": 0, "response": "x", "reward": math.nan, "versions": [[1], "x", [0, 3]], "accuracy": None}
    odd = [row, row | {"tokens": {"text": ["x"], "shift": [math.nan], "weight": [1, 2]}}, {"step": "x"}, {"step": 1}]
    write(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "policy/loss": 1.0}])
    write(tmp_path / "run" / "trajectories" / "from-000000.jsonl", odd)
    (run,) = read_runs([tmp_path / "run"])
    shown = chosen_responses(run, 10, 10)[0]
    assert [found["tokens"] for found in shown] == [{"text": ["x"], "shift": [None]}, None]
    assert shown[0]["versions"] == [[0, 3]]
    assert shown[0]["reward"] is None
    assert "data" in render([run], smooth=1, responses=10, token_limit=10)


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_step_that_is_there_twice_counts_once(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": s, "policy/loss": i} for i, s in enumerate([0, 1, 2, 1, 2, 3])])
    series = read_runs([tmp_path])[0].get("policy/loss")
    assert (series.steps.tolist(), series.values.tolist()) == ([0, 1, 2, 3], [0, 3, 4, 5])
    assert len(list(rows(tmp_path / "metrics.jsonl"))) == 6


def test_bad_input_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "old" / "metrics.jsonl", [{"step": 0, "accuracy": 0.5}])
    write(tmp_path / "yaml" / "metrics.jsonl", [{"step": 0, "policy/loss": 0.5}])
    (tmp_path / "yaml" / "config.yaml").write_text("a: [")
    for name, text in (
        ("missing", "does not exist"),
        ("empty", "holds no run"),
        ("old", "another version"),
        ("yaml", "config.yaml: not YAML"),
    ):
        assert main([str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error
        assert text in error
    assert not (tmp_path / "out.html").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "old"), "--smooth", "-1"])


def test_same_names_are_told_apart(tmp_path):
    for parent in "ab":
        write(tmp_path / parent / "run" / "metrics.jsonl", [{"step": 0, "policy/loss": 1.0}])
    found = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.name for run in found] == ["a/run", "b/run"]
    assert len({run.name for run in read_runs([tmp_path / "a" / "run"] * 2)}) == 2


def test_picture_is_1600_pixels_wide(runs, tmp_path):
    """Also with names that matplotlib would take for mathematics."""
    (tmp_path / "$x_1$").symlink_to(runs / "good")
    for paths in ([runs / "good"], [tmp_path / "$x_1$", runs / "broken"]):
        image = draw(read_runs(paths), smooth=5)
        assert image.startswith(b"\x89PNG")
        assert int.from_bytes(image[16:20], "big") == 1600


@pytest.mark.processes
def test_as_a_command(runs, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fipo_megatron.report",
        str(runs / "good"),
        str(runs / "broken"),
        "--output",
        f"{tmp_path}/new/",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.png"]


def test_without_matplotlib_the_page_is_written_and_the_picture_is_said_to_be_missing(tmp_path, monkeypatch, capsys):
    write(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "policy/loss": 1.0}])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(tmp_path / "run")]) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("report*")) == ["report.html"]
    said = capsys.readouterr().err
    assert "report.png: not drawn, matplotlib is not installed" in said
    assert "fipo-megatron[report]" in said
