"""The metrics ``moments/*`` of a training step: counted while responses are scored, and nothing else changes."""

import asyncio

import numpy as np
import pytest

from examples.quickstart import task
from fipo_megatron.config import load_config
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.moments.recording import MomentTotals
from fipo_megatron.observe import metrics as registry
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from tests import runs
from tests.runs import CONFIG

TEXTS = {
    "Answer: 5": (1, 0, 0),
    "Answer: 4": (1, 0, 0),
    "Answer: 5\nWait, check again.\nAnswer: 4": (2, 1, 0),
    "Answer: 4\nAgain.\nAnswer: 5": (2, 0, 1),
    "2+3=5": (0, 0, 0),
}
"""Responses to a problem whose answer is 5: number of candidates, Oops, Aha."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    return directory


class Counting:
    """A verifier that counts how often it is asked."""

    def __init__(self, verifier):
        self.verifier, self.asked = verifier, 0

    async def verify(self, answer):
        self.asked += 1
        return await self.verifier.verify(answer)


def scored(data, *overrides):
    """Scores all texts, and one that was cut off; returns the totals, and how often the verifier was asked."""
    config = load_config(CONFIG, overrides)
    tokenizer = load_tokenizer(data / "model")
    prompt = Prompt("p", np.array(tokenizer("2+3?")["input_ids"]), "5")

    async def score():
        verifier = Counting(open_verifier(config.reward))
        scorer = ResponseScorer(config, verifier, tokenizer)
        for number, (text, reason) in enumerate([*((text, "stop") for text in TEXTS), ("Answer: 5", "length")]):
            ids = np.array(tokenizer(text)["input_ids"])
            zeros, ones = np.zeros(len(ids), np.float32), np.ones(len(ids), np.bool_)
            await scorer(Trajectory(prompt, number, ids, zeros, ones, finish_reason=reason))
        await verifier.verifier.close()
        return scorer.take_moments(), scorer.take_moments(), verifier.asked

    return asyncio.run(score())


def test_responses_are_counted_as_they_are_scored(data):
    totals, after, asked = scored(data, "observe.moments=true")
    found = MomentTotals.total([totals, totals]).metrics()
    counts = {
        name: found[f"moments/{name}"] for name in ("responses", "answered", "several", "oops", "aha", "truncated")
    }
    assert counts == {"responses": 10, "answered": 8, "several": 4, "oops": 2, "aha": 2, "truncated": 2}
    assert (found["moments/oops_strict"], found["moments/aha_strict"]) == (2, 0)
    assert found["moments/oops_fraction"] == 0.2
    assert found["moments/oops_fraction_low"] < 0.2 < found["moments/oops_fraction_high"]
    assert after.metrics()["moments/responses"] == 0
    assert after.metrics()["moments/oops_fraction"] is None
    assert asked == len(TEXTS) + 4, "only candidates of responses with several are checked beside the responses"


def test_nothing_is_counted_by_default(data):
    totals, _, asked = scored(data)
    assert not totals.complete.counts
    assert asked == len(TEXTS)


@pytest.mark.distributed
def test_a_run_reports_them_and_is_otherwise_the_same(data, tmp_path):
    """Every response is scored by chance; a random model gives few answers, but all tags."""
    plain, counted = tmp_path / "plain", tmp_path / "counted"
    runs.train(data, plain, "run.steps=2")
    runs.train(data, counted, "run.steps=2", "observe.moments=true", "observe.moments_extractor=answer,phrase")
    tags = {metric.tag for metric in registry.METRICS if metric.group == "moments"}
    for one, other in zip(runs.metrics(plain), runs.metrics(counted), strict=True):
        assert not tags & set(one)
        assert tags <= set(other)
        assert {tag: value for tag, value in other.items() if tag not in tags} == one
        assert other["moments/responses"] + other["moments/truncated"] >= 16


@pytest.mark.distributed
def test_a_wrong_extractor_is_refused_at_the_start(data, tmp_path):
    said = runs.train(data, tmp_path / "run", "observe.moments=true", "observe.moments_extractor=boxes", code=2)
    assert "observe.moments_extractor: extractor = boxes: must be of boxed, answer, phrase" in said
