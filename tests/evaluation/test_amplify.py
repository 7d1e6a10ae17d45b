"""Amplification on tiny random models: the rows of γ = 0, the table, the choice on a half, errors and resuming."""

import asyncio
import json
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from examples.quickstart import task
from fipo_megatron import evaluate
from fipo_megatron.config import load_config
from fipo_megatron.evaluation.amplify_runs import (
    FACTORS,
    TOLERANCE,
    Run,
    Setting,
    TokenMeans,
    matches,
    settings_of,
    temperature_for,
)
from fipo_megatron.evaluation.amplify_table import Amplification, Amplified
from fipo_megatron.evaluation.evaluation_inputs import read_evaluation_inputs
from fipo_megatron.evaluation.results import ProblemResult
from fipo_megatron.evaluation.standalone import sample_and_count
from fipo_megatron.rollout.embedded.drawing import Amplify
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart" / "fipo.yaml"
PROBLEMS, SAMPLES = 10, 2
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Builds problems, a model with random weights and sharp distributions, and one whose weights differ a little."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    lines = (directory / "held_out.jsonl").read_text().splitlines(keepends=True)[:PROBLEMS]
    (directory / "few.jsonl").write_text("".join(lines))
    shutil.copytree(directory / "model", directory / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.model.norm.weight *= 10
        model.save_pretrained(directory / "model")
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory / "base")
    return directory


def settings(data, output, *overrides):
    return [
        *(f"model.path={data}/model", f"evaluation.files=[{data}/few.jsonl]", f"run.output={output}"),
        *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
        *(f"evaluation.samples_per_prompt={SAMPLES}", "rollout.max_response_tokens=12", "rollout.embedded_slots=32"),
        *overrides,
    ]


def run(data, output, *overrides, base="base"):
    """Runs the program in this process and returns its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    grid = [f"amplify.base={data}/{base}", "amplify.gamma=[0.5,2.0]", "amplify.threshold=[null,0.0]"]
    try:
        return evaluate.main([str(CONFIG), *settings(data, output, *(grid if base else []), *overrides)])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def amplified(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("amplified")
    assert run(data, output) == 0
    return output / "amplify-model"


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_gamma_0_gives_the_rows_of_the_plain_evaluation(data, amplified, tmp_path):
    assert run(data, tmp_path, base="") == 0
    plain = (tmp_path / "evaluation-model" / "problems.jsonl").read_bytes()
    assert (amplified / "runs" / "rl-temperature-1.0.jsonl").read_bytes() == plain
    config = load_config(CONFIG, settings(data, tmp_path, "evaluation.name=again"))
    inputs = read_evaluation_inputs(config)
    for second, primary_is_rl in (("base", True), ("model", False)):
        rule = Amplify(0.0, None, primary_is_rl)
        primary = {"base": "model", "model": "base"}[second]
        found = asyncio.run(
            sample_and_count(
                config,
                inputs,
                data / "model",
                embedded=lambda rl, p=primary, s=second, r=rule: EmbeddedEngine(data / p, second=(data / s, r)),
            )
        )
        assert [vars(row) | {"failed": 0} for row in found.problems] == [
            json.loads(line) | {"failed": 0} for line in plain.splitlines()
        ]


def test_results_are_those_of_the_rows(amplified):
    found = json.loads((amplified / "amplify.json").read_text())
    rl = np.array([row["right"] / SAMPLES for row in rows_of(amplified / "runs" / "rl-temperature-1.0.jsonl")])
    assert found["problems"] == PROBLEMS
    assert [(one["gamma"], one["threshold"]) for one in found["settings"]] == [(0.5, None), (0.5, 0), (2, None), (2, 0)]
    halves = []
    for one in found["settings"]:
        file = amplified / "runs" / f"gamma-{one['gamma']}-threshold-{json.dumps(one['threshold'])}.jsonl"
        share = np.array([row["right"] / SAMPLES for row in rows_of(file)])
        control = amplified / "runs" / f"rl-temperature-{one['control']['temperature']}.jsonl"
        other = np.array([row["right"] / SAMPLES for row in rows_of(control)])
        accuracy, drawn = one["accuracy"], one["amplified"]
        assert accuracy["amplified"]["value"] == pytest.approx(share.mean())
        assert accuracy["over_rl"]["value"] == pytest.approx((share - rl).mean())
        assert accuracy["over_rl"]["low"] <= accuracy["over_rl"]["value"] <= accuracy["over_rl"]["high"]
        assert accuracy["over_control"]["value"] == pytest.approx((share - other).mean())
        assert drawn["response_tokens"] == pytest.approx(np.mean([row["response_tokens"] for row in rows_of(file)]))
        assert 0 < drawn["changed_fraction"] <= drawn["selected_fraction"] <= 1
        assert (drawn["selected_fraction"] == 1) == (one["threshold"] is None)
        halves.append((share[0::2].mean(), share[1::2].mean()))
    chosen = int(np.argmax([first for first, _ in halves]))
    choice, setting = found["choice"], found["settings"][chosen]
    assert (choice["gamma"], choice["threshold"]) == (setting["gamma"], setting["threshold"])
    for part, value in zip(("chosen_on", "reported_on"), halves[chosen], strict=True):
        assert choice[part]["problems"] == PROBLEMS // 2
        assert choice[part]["accuracy"]["amplified"]["value"] == pytest.approx(value)


def test_controls_have_the_entropy_of_the_amplified_runs(amplified):
    found = json.loads((amplified / "amplify.json").read_text())
    for one in found["settings"]:
        near = pytest.approx(one["amplified"]["entropy"], rel=TOLERANCE)
        assert (one["control"]["entropy"] == near) == one["control"]["matched"]
    matched = {one["control"]["temperature"] for one in found["settings"] if one["control"]["matched"]}
    assert len(matched) >= 2, found["settings"]
    assert any(temperature < 0.95 for temperature in matched), found["settings"]
    curve = found["rl"]["entropies"]
    assert all(low < high for low, high in pairwise(curve))
    assert curve[FACTORS.index(1.0)] == found["rl"]["entropy"]


def test_a_finished_run_is_not_sampled_again(data, amplified, tmp_path, caplog, capsys):
    """A run whose rows are there, but not its means, was interrupted."""
    output = tmp_path / "amplify-model"
    shutil.copytree(amplified, output)
    again = sorted((output / "runs").glob("gamma-*.json"))[1]
    files = {file: file.read_bytes() for file in output.rglob("*.json*")}
    again.unlink()
    (output / "amplify.json").unlink()
    caplog.set_level("INFO")
    capsys.readouterr()
    assert run(data, tmp_path) == 0
    assert {file: file.read_bytes() for file in output.rglob("*.json*")} == files
    sampled = [record for record in caplog.messages if "responses" in record]
    assert [line.partition(",")[0] for line in sampled] == [f"{PROBLEMS * SAMPLES} of {PROBLEMS * SAMPLES} responses"]
    text = capsys.readouterr().out
    for part in ("γ = ", "none", "Chosen on 5 problems", "On the other 5", "amplify.json"):
        assert part in text
    assert run(data, tmp_path) == 2
    assert "amplify-model: already holds an evaluation" in capsys.readouterr().err


def test_runs_with_other_settings_are_not_mixed(data, amplified, tmp_path, capsys):
    shutil.copytree(amplified, tmp_path / "amplify-model")
    (tmp_path / "amplify-model" / "amplify.json").unlink()
    assert run(data, tmp_path, "seed=5", "amplify.primary=base") == 2
    error = capsys.readouterr().err
    assert "amplify-model: holds an interrupted amplification with another seed, primary; choose" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["amplify.gamma=[0.1,0]"], "amplify.gamma.1 = 0: must be greater than 0"),
        (["amplify.gamma=[]"], "amplify.gamma = []: "),
        (["amplify.threshold=[low]"], "amplify.threshold.0"),
        (["amplify.threshold=[]"], "amplify.threshold = []: "),
        (["amplify.primary=both"], "amplify.primary = 'both': "),
        (["amplify.base=/nowhere"], "amplify.base = '/nowhere': has no config.json"),
        (
            ["rollout.engine=sglang"],
            "rollout.engine = sglang: must be embedded with amplify.base; a server has no second model",
        ),
    ],
)
def test_errors_come_before_anything_is_built(overrides, message, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *overrides) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_models_with_another_vocabulary_are_named(data, tmp_path, capsys):
    other = tmp_path / "data" / "other"
    shutil.copytree(data / "base", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(data, tmp_path / "out", f"amplify.base={other}") == 2
    error = capsys.readouterr().err
    assert f"in amplify.base = {other} " in error
    assert "the tokenizers must be equal" in error


def made_up(rights):
    means = TokenMeans(1.0, 100, 0, 0, (1.0,))
    return Run(
        tuple(ProblemResult("d", str(i), "1", 2, n, 2, {}, 5.0, 0, "1", n > 0) for i, n in enumerate(rights)), means
    )


def test_the_choice_sees_the_first_half_only():
    """The second setting is the best on all problems and on the second half, the first one on the first half."""
    first, second = made_up([2, 0, 2, 0, 1, 0]), made_up([1, 2, 1, 2, 2, 2])
    alone = made_up([1, 1, 1, 1, 1, 1])
    runs = [Amplified(Setting(gamma, None), one, alone) for gamma, one in ((0.1, first), (0.2, second))]
    found = Amplification(alone, runs)
    assert found.chosen().setting.gamma == 0.1
    values = found.as_json()["choice"]
    assert values["chosen_on"]["accuracy"]["over_rl"]["value"] == pytest.approx(1 / 3)
    assert values["reported_on"]["accuracy"]["over_rl"]["value"] == pytest.approx(-0.5)


def test_problems_without_a_checked_response_are_left_out():
    alone, one = made_up([1, 1, 2]), made_up([2, 2, 2])
    unchecked = replace(one.problems[0], right=0, failed=2)
    one = replace(one, problems=(unchecked, *one.problems[1:]))
    found = Amplification(alone, [Amplified(Setting(0.1, None), one, alone)])
    assert found.compare(found.amplified[0]).over_rl.value == pytest.approx(0.25)


@pytest.mark.parametrize("wanted", [0.01, 0.3, 1.0, 2.5])
def test_a_matched_temperature_has_the_entropy(wanted):
    """Logits of many positions; the entropy of softmax at the temperature found is the one asked for."""
    logits = np.random.default_rng(0).normal(size=(400, 20)) * 4

    def entropy(temperature):
        probabilities = np.exp(logits / temperature - np.max(logits / temperature, axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return float(-np.sum(probabilities * np.log(probabilities + 1e-300), axis=1).mean())

    means = TokenMeans(0.8, 400, 0, 0, tuple(entropy(0.8 * factor) for factor in FACTORS))
    problems = made_up([1]).problems
    temperature = temperature_for([Run(problems, means)], wanted)
    if means.entropies[0] < wanted < means.entropies[-1]:
        assert entropy(temperature) == pytest.approx(wanted, rel=0.02)
    else:
        assert temperature in (0.1, 1.6)
    control = Run(problems, TokenMeans(temperature, 1, 0, 0, (entropy(temperature),)))
    assert matches(control, wanted) == (means.entropies[0] < wanted < means.entropies[-1])


def test_a_temperature_between_two_runs_is_interpolated_in_their_own_entropies():
    runs = [Run(made_up([1]).problems, TokenMeans(t, 1, 0, 0, (e,))) for t, e in ((1.0, 0.4), (0.25, 0.1), (0.1, 0.05))]
    assert temperature_for(runs, 0.2) == pytest.approx(0.5)
    assert temperature_for(runs, 0.1) == 0.25


def test_equal_settings_are_sampled_once():
    config = load_config(CONFIG, ["amplify.gamma=[0.5,0.5]", "amplify.threshold=[null,0,0.0]"])
    assert settings_of(config) == [Setting(0.5, None), Setting(0.5, 0.0)]
