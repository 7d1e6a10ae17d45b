"""Scores of responses whose check failed; evaluations that leave them out or end."""

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from fipo_megatron.config import Config, EvaluationConfig, RewardConfig
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.data.trajectory import Prompt, Score, TokenSpan, Trajectory
from fipo_megatron.evaluation.answering import evaluate
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier_protocol import Verdict
from fipo_megatron.rollout.engine import Generation
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

CONFIG = Config(
    reward=RewardConfig(overlong_buffer_tokens=0),
    evaluation=EvaluationConfig(samples_per_prompt=4),
)
FAILED = Verdict(False, None, "crash", "it exited with code 3")


class Tokenizer:
    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


class FixedVerifier:
    """Fails on the responses that begin with one of ``failing``; other responses to prompt 1 are right."""

    def __init__(self, *failing, verdict=FAILED):
        self.failing, self.verdict, self.asked = failing, verdict, 0

    async def verify(self, answer):
        self.asked += 1
        if int(answer.response.split()[0]) in self.failing:
            return self.verdict
        return Verdict(answer.prompt == "1", "34")


def scored(verifier, config=CONFIG, finish_reason="stop"):
    prompt = Prompt("p", np.array([1], np.int32), "34")
    trajectory = Trajectory(
        prompt, 0, np.array([7, 8], np.int32), np.full(2, -1.0, np.float32), np.ones(2, bool), (TokenSpan(0, 0),)
    )
    scorer = ResponseScorer(config, verifier, Tokenizer())
    return asyncio.run(scorer(replace(trajectory, finish_reason=finish_reason)))


def test_a_failed_check_has_no_reward_unless_it_counts_as_wrong():
    assert scored(FixedVerifier()) == Score(1.0, 1)
    assert scored(FixedVerifier(7)) == Score(None, None, "crash", "it exited with code 3")
    wrong = replace(CONFIG, reward=replace(CONFIG.reward, on_failure="wrong"))
    assert scored(FixedVerifier(7), wrong) == Score(-1.0, 0, "crash", "it exited with code 3")


def test_a_response_that_the_verifier_never_sees_is_no_check():
    truncated = replace(CONFIG, reward=replace(CONFIG.reward, truncated_is_wrong=True))
    verifier = FixedVerifier(7)
    assert scored(verifier, truncated, "length") == Score(-1.0, 0, asked=False)
    assert verifier.asked == 0


class Engine:
    """Answers sample n with token n."""

    async def generate(self, request):
        sample = int(request.id.rpartition("/")[2])
        return Generation(np.array([sample], np.int32), np.array([-1.0], np.float32), (TokenSpan(0, 0),), "stop")


def evaluated(verifier, config=CONFIG):
    problems = [Prompt(str(n), np.array([n], np.int32), "34", "set") for n in (1, 2)]
    scorer = ResponseScorer(config, verifier, Tokenizer())
    coordinator = StoreCoordinator(dist.HashStore(), 0)
    return asyncio.run(evaluate(problems, Engine(), coordinator, scorer, config, (0,)))


def test_an_evaluation_leaves_failed_checks_out(caplog):
    generous = replace(CONFIG, reward=replace(CONFIG.reward, max_failure_fraction=0.25))
    with caplog.at_level(logging.WARNING):
        found = evaluated(FixedVerifier(0), generous)
    assert [(row.samples, row.failed, row.right) for row in found.problems] == [(4, 1, 3), (4, 1, 0)]
    assert found.accuracy == 0.5
    assert "the verifier failed on 2 of 8 answers, crash: it exited with code 3; they are left out" in caplog.text
    whole = evaluated(FixedVerifier())
    assert (whole.accuracy, whole.failed_checks) == (0.5, 0)


def test_an_evaluation_with_too_many_failed_checks_ends_with_the_text():
    verifier = FixedVerifier(0)
    with pytest.raises(VerifierError, match=r"max_failure_fraction = 0\.1.*it exited with code 3"):
        evaluated(verifier)
    with pytest.raises(VerifierError, match="it exited with code 3"):
        evaluated(FixedVerifier(0, 1, 2, 3), replace(CONFIG, reward=replace(CONFIG.reward, max_failure_fraction=1.0)))


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_a_verifier_that_fails_on_one_of_two_leaders_ends_the_evaluation_on_both(fraction):
    """The error is of one type, and has the same text, on the leader that met it and on the other one."""
    config = replace(CONFIG, reward=replace(CONFIG.reward, max_failure_fraction=fraction))
    problems = [Prompt(str(n), np.array([n], np.int32), "34", "set") for n in (1, 2)]
    store = dist.HashStore()

    async def evaluated_by(rank, verifier):
        scorer = ResponseScorer(config, verifier, Tokenizer())
        coordinator = StoreCoordinator(store, rank, (0, 1), 2)
        await evaluate(problems, Engine(), coordinator, scorer, config, (0,))

    class Broken(FixedVerifier):
        async def verify(self, answer):
            raise VerifierError("it exited with code 3")

    async def both():
        broken = FixedVerifier(0, 1, 2, 3) if fraction < 1 else Broken()
        calls = [evaluated_by(0, FixedVerifier()), evaluated_by(1, broken)]
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(both())
    assert [type(error) for error in errors] == [VerifierError] * 2
    assert "it exited with code 3" in str(errors[0])
    assert str(errors[0]) == str(errors[1])
