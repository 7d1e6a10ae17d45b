"""The command on the quickstart's model with random weights: bit for bit at the ends, calibrated in between."""

import json
import shutil

import numpy as np
import pytest

from fipo_megatron import cli
from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron
from fipo_megatron.compare.response_file import read_responses
from fipo_megatron.compare.swap_curves import Pooled, crossing, reached, share_with_interval
from fipo_megatron.compare.swap_points import CALIBRATED, threshold_for
from fipo_megatron.data.tokenizer import load_tokenizer
from tests.compare.results import check_page, models, rows, settings
from tests.runs import CONFIG

pytestmark = pytest.mark.timeout(300)
SEEDS = (1, 2)
SELECT = ("delta", "js", "random")
CHOSEN = ("rollout.embedded_slots=32", "evaluation.samples_per_prompt=4", "reward.truncated_is_wrong=false")


def swap(data, output, *overrides):
    curves = [f"compare.select=[{','.join(SELECT)}]", "compare.share=[0.2]", "compare.seeds=[1,2]"]
    given = [*models(data), *settings(data, output), *CHOSEN, *curves, *overrides]
    return cli.main(["compare", "swap", str(CONFIG), *given])


@pytest.fixture(scope="module")
def swapped(data, tmp_path_factory):
    """The results of a comparison."""
    output = tmp_path_factory.mktemp("out")
    assert swap(data, output) == 0
    return output / "swap-changed"


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    """``problems.jsonl`` of ``fipo evaluate`` by model and seed."""
    output = tmp_path_factory.mktemp("evaluate")

    def evaluate(role, seed):
        model = {"base": "model", "rl": "changed"}[role]
        arguments = [f"model.path={data}/{model}", f"seed={seed}", f"evaluation.name={role}-{seed}"]
        assert cli.main(["evaluate", str(CONFIG), *settings(data, output), *CHOSEN, *arguments]) == 0
        return (output / f"evaluation-{role}-{seed}" / "problems.jsonl").read_bytes()

    return {(role, seed): evaluate(role, seed) for role in ("base", "rl") for seed in SEEDS}


def test_the_models_alone_have_the_rows_of_their_evaluations(swapped, evaluated):
    for (role, seed), content in evaluated.items():
        assert (swapped / "points" / f"{role}-seed{seed}.problems.jsonl").read_bytes() == content
    found = json.loads((swapped / "swap.json").read_text())["alone"]
    for role in ("base", "rl"):
        own = [json.loads(line) for seed in SEEDS for line in evaluated[role, seed].splitlines()]
        assert found[role]["accuracy"] == pytest.approx(sum(r["right"] for r in own) / sum(r["samples"] for r in own))
        assert (found[role]["selected"], found[role]["changed"]) == (0, 0)


@pytest.mark.parametrize(("selector", "never", "always"), [("js", 1.0, -1.0), ("delta", -1e12, None)])
def test_swapping_never_or_always_gives_the_rows_of_an_evaluation(data, evaluated, tmp_path, selector, never, always):
    thresholds = [value for value in (never, always) if value is not None]
    chosen = [f"compare.select=[{selector}]", f"compare.threshold={thresholds}"]
    assert swap(data, tmp_path, *chosen) == 0
    points = tmp_path / "swap-changed" / "points"
    for primary, second, direction in (("base", "rl", "base_to_rl"), ("rl", "base", "rl_to_base")):
        for value, role in ((never, primary), (always, second)):
            for seed in SEEDS:
                if value is not None:
                    name = f"{direction}-{selector}-threshold{value:g}-seed{seed}"
                    assert (points / f"{name}.problems.jsonl").read_bytes() == evaluated[role, seed], name
    if always is not None:
        for curve in json.loads((tmp_path / "swap-changed" / "swap.json").read_text())["curves"]:
            assert [point["selected"] for point in curve["points"]] == [0, 1]
            assert [point["recovered"] for point in curve["points"]] == [0, 1]


def test_a_target_share_is_reached(swapped):
    """About 900 positions per curve: the standard error of a share of 0.2 is 0.013."""
    curves = json.loads((swapped / "swap.json").read_text())["curves"]
    assert [(c["direction"], c["selector"]) for c in curves] == [
        (direction, selector) for direction in ("base_to_rl", "rl_to_base") for selector in SELECT
    ]
    for curve in curves:
        (point,) = curve["points"]
        assert point["selected"] == pytest.approx(0.2, abs=0.07)
        assert 0 < point["changed"] <= point["selected"]
        assert point["low"] <= point["accuracy"] <= point["high"]
        assert point["responses"] == 6 * 4 * len(SEEDS)


def test_swapped_tokens_are_marked(swapped):
    for curve in json.loads((swapped / "swap.json").read_text())["curves"]:
        (point,) = curve["points"]
        name = f"{curve['direction']}-{curve['selector']}-share0.2"
        found = [row for seed in SEEDS for row in rows(swapped / f"responses-{name}-seed{seed}.jsonl")]
        assert sum(len(row["response_ids"]) for row in found) == point["tokens"]
        assert sum(len(row["selected"]) for row in found) / point["tokens"] == point["selected"]
        for row in found:
            assert set(row["changed"]) <= set(row["selected"])
            assert len(row["quantity"]) == len(row["selected"])
            for value in row["quantity"]:  # rounded to four digits
                below = value < point["threshold"]
                assert below == (curve["selector"] == "delta") or value == pytest.approx(point["threshold"], rel=1e-3)
    assert not any(row["selected"] for row in rows(swapped / "responses-base-seed1.jsonl"))


def test_the_page_is_whole_and_loads_nothing(swapped):
    check_page(swapped / "report.html")


def test_other_commands_read_the_responses(data, swapped, capsys):
    file = swapped / "responses-base_to_rl-js-share0.2-seed1.jsonl"
    assert cli.main(["moments", str(file), "--verifier", "exact"]) == 0
    assert capsys.readouterr().out.startswith("complete responses: ")
    tokenizer = load_tokenizer(data / "model")
    found = read_responses([str(file)], tokenizer, 284)
    assert (len(found.trajectories), found.inexact) == (24, 0)


def test_an_interrupted_comparison_samples_only_what_is_left(data, swapped, tmp_path, capsys):
    copy = tmp_path / "swap-changed"
    shutil.copytree(swapped, copy)
    lost = "rl_to_base-js-share0.2-seed2"
    for file in (copy / "swap.json", copy / "points" / f"{lost}.json", copy / f"responses-{lost}.jsonl"):
        file.unlink()
    times = {file: file.stat().st_mtime_ns for file in (copy / "points").iterdir() if lost not in file.name}
    assert swap(data, tmp_path) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    for file in (f"points/{lost}.json", f"points/{lost}.problems.jsonl", f"responses-{lost}.jsonl", "swap.json"):
        assert (copy / file).read_bytes() == (swapped / file).read_bytes(), file
    capsys.readouterr()
    assert swap(data, tmp_path, "evaluation.temperature=0.5") == 2
    assert "holds points with another temperature; choose another name" in capsys.readouterr().err


def test_another_share_is_added_to_a_finished_comparison(data, swapped, tmp_path):
    copy = tmp_path / "swap-changed"
    shutil.copytree(swapped, copy)
    before = {file.name for file in (copy / "points").iterdir()}
    chosen = ["compare.direction=base_to_rl", "compare.select=[random]", "compare.share=[0.4,0.2]"]
    assert swap(data, tmp_path, *chosen) == 0
    added = {file.name for file in (copy / "points").iterdir()} - before
    names = [f"base_to_rl-random-share0.4-seed{seed}" for seed in SEEDS]
    assert added == {f"{name}.{end}" for name in names for end in ("json", "problems.jsonl")}
    (curve,) = json.loads((copy / "swap.json").read_text())["curves"]
    assert [point["share"] for point in curve["points"]] == [0.2, 0.4]


def test_a_checkpoint_gives_the_points_of_its_model(data, swapped, tmp_path):
    hf_to_megatron(data / "changed", tmp_path / "checkpoint", Options())
    chosen = ["compare.direction=base_to_rl", "compare.select=[js]", f"compare.rl={tmp_path}/checkpoint"]
    assert swap(data, tmp_path, "compare.name=changed", *chosen) == 0
    found = tmp_path / "swap-changed" / "points"
    for name in ("rl-seed2", "base_to_rl-js-share0.2-seed1"):
        file = f"{name}.problems.jsonl"
        assert (found / file).read_bytes() == (swapped / "points" / file).read_bytes()
    assert not (tmp_path / "swap-changed" / "hf.temporary").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=sglang", "must be [delta] with rollout.engine = sglang"),
        ("evaluation.files=[] run.evaluate_every=0", "evaluation.files: empty; name the problems to answer"),
        ("compare.select=[]", "compare.select: empty; expected at least one value"),
        ("compare.select=[js,js]", "compare.select = ['js', 'js']: names js more than once"),
        ("compare.select=[top]", "compare.select"),
        ("compare.share=[0.1,0.1]", "compare.share = [0.1, 0.1]: names 0.1 more than once"),
        ("compare.share=[1.5]", "compare.share"),
        ("compare.threshold=[0.1]", "must be one quantity with compare.threshold"),
        ("compare.seeds=[3,3]", "compare.seeds = [3, 3]: names 3 more than once"),
        ("compare.direction=back", "compare.direction"),
        ("compare.rl=/nowhere", "compare.rl = '/nowhere': has no config.json"),
        ('compare.base=""', "compare.base: missing; expected a Hugging Face directory"),
        ("reward.verifier=unknown", "reward.verifier"),
    ],
)
def test_mistakes_are_one_sentence(data, tmp_path, capsys, override, message):
    assert swap(data, tmp_path, *override.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_stop_tokens_are_named(data, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(data / "changed", other)
    file = other / "generation_config.json"
    generation = json.loads(file.read_text())
    file.write_text(json.dumps(generation | {"eos_token_id": [5]}))
    assert swap(data, tmp_path, f"compare.rl={other}") == 2
    assert "they must be equal: eos_token_id in generation_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("selector", CALIBRATED)
@pytest.mark.parametrize("share", [0.001, 0.25, 0.9, 0.9999])
def test_a_threshold_selects_the_share_of_the_given_positions(selector, share):
    quantities = np.random.default_rng(0).normal(size=(1000, len(CALIBRATED)))
    threshold, column = threshold_for(selector, share, quantities), quantities[:, CALIBRATED.index(selector)]
    selected = column < threshold if selector == "delta" else column > threshold
    assert selected.sum() == min(round(1000 * share), 999)


def test_positions_with_equal_quantities_are_not_selected():
    quantities = np.zeros((10, len(CALIBRATED)))
    for selector in CALIBRATED:
        assert threshold_for(selector, 0.3, quantities) == 0
    assert threshold_for("random", 0.3, quantities) == 0.7


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.1, 0.5, 1.0], 0.1 + 0.1 * 0.41 / 0.5), ([0.1, 0.91, 0.5], 0.1), ([0.1, 0.2, 0.3], np.inf)],
)
def test_the_share_that_recovers_the_gap_is_interpolated(accuracies, expected):
    """The gap is from 0.1 to 1; 90 % of it are recovered at an accuracy of 0.91."""
    assert crossing([0.0, 0.1, 0.2], np.array(accuracies), 1.0) == pytest.approx(expected)
    assert crossing([0.0, 0.2, 0.1], np.array(accuracies)[[0, 2, 1]], 1.0) == pytest.approx(expected)


def test_the_interval_of_a_share_is_over_problems():
    """Half of the problems gain at the first point, the others at the second."""
    start, half, whole = np.zeros(40), np.repeat([1.0, 0.0], 20), np.ones(40)
    columns = [Pooled((), each) for each in (start, half, whole)]
    found = share_with_interval(columns, Pooled((), whole), [0.0, 0.1, 0.2])
    assert found["value"] == pytest.approx(0.18)
    assert 0.15 < found["low"] < 0.18 < found["high"] < 0.19
    assert share_with_interval(columns[:2], Pooled((), whole), [0.0, 0.1]) == dict.fromkeys(("value", "low", "high"))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [(0.1, 0.09, 0.11, "10.0 % (9.0–11.0)"), (0.1, 0.09, None, "10.0 % (9.0–> 20.0)"), (None, 0.19, None, "> 20.0 %")],
)
def test_a_share_that_is_not_reached_has_no_interval(value, low, high, expected):
    curve = {"points": [{"selected": 0.2}], "share_at_90%": {"selected": {"value": value, "low": low, "high": high}}}
    assert reached(curve, "selected") == expected
