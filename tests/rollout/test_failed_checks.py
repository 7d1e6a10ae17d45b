"""Steps in which the verifier fails on some answers: these are masked, counted and told, or the step ends."""

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest

from fipo_megatron.config import AlgorithmConfig
from fipo_megatron.data.batch import compute_advantages
from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Score
from fipo_megatron.observe.step_metrics import rollout_metrics
from fipo_megatron.rollout import carry_over
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.sampler import Sampler
from tests.rollout.test_sampler import SETTINGS, Prompts, model

MANY = replace(SETTINGS, max_failure_fraction=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


class Failing(Prompts):
    """Prompts whose checks fail for the names in ``failing`` (``<prompt>/<sample>``)."""

    def __init__(self, right, failing, *, mask=True):
        super().__init__(right)
        self.failing, self.mask = set(failing), mask

    async def score(self, trajectory):
        score = await super().score(trajectory)
        if trajectory.name not in self.failing:
            return score
        if not self.mask:
            return replace(score, reward=-1.0, accuracy=0, failure="timeout", failure_text="too slow")
        return Score(None, None, "timeout" if trajectory.sample % 2 else "error", f"no verdict on {trajectory.name}")


def sample(path, prompts, settings=MANY):
    async def run():
        sampler = Sampler(EmbeddedEngine(path), settings, prompts.score)
        return await sampler.step(prompts, 0), sampler

    return asyncio.run(run())


def test_failed_checks_are_masked_and_left_out_of_the_group(path, caplog):
    """Sample 0 of prompts 0 and 1 fails; of prompt 2, the only right answer: the group is all wrong."""
    with caplog.at_level(logging.WARNING):
        sampled, _ = sample(path, Failing([2, 3, 1, 2, 2], ["0/0", "1/0", "1/1", "2/0"]))
    whole, _ = sample(path, Prompts([2, 3, 1, 2, 2]))
    groups = {group.prompt.id: group for group in sampled.groups}
    assert set(groups) == {"0", "1", "3"}
    failed = groups["0"].trajectories[0]
    assert (failed.reward, failed.accuracy, failed.failure) == (None, None, "error")
    assert not failed.mask.any()
    [unmasked] = [group for group in whole.groups if group.prompt.id == "0"]
    assert failed.tokens.tolist() == unmasked.trajectories[0].tokens.tolist(), "sampled as without failures"
    advantages = [t.advantage for t in compute_advantages([groups["0"]], AlgorithmConfig())[0].trajectories]
    assert advantages[0] == 0.0
    assert advantages[1:] == pytest.approx([1.1547, -0.57735, -0.57735], abs=1e-4), "of rewards 1, −1, −1"
    two = compute_advantages([groups["1"]], AlgorithmConfig(advantage_baseline="group_mean"))[0]
    assert [t.advantage for t in two.trajectories] == [0.0, 0.0, 1.0, -1.0]
    statistics = dict(sampled.statistics)
    assert (statistics["failures_error"], statistics["failures_timeout"], statistics["groups_all_wrong"]) == (3, 1, 1)
    found = rollout_metrics(sampled, 0)
    assert (found["sampler/failures_error"], found["sampler/failures_timeout"]) == (3, 1)
    assert "sampler/failures_crash" not in found
    assert found["rollout/accuracy"] == pytest.approx((1 / 3 * 3 + 1 + 2) / 9)
    assert found["rollout/reward"] == pytest.approx(2 * found["rollout/accuracy"] - 1)
    told = [record.message for record in caplog.records if "verifier failed" in record.message]
    assert len(told) == 2
    assert "the verifier failed on 3 of 16 answers, error: no verdict on 0/0" in told[0] + told[1]


def test_without_failures_nothing_changes(path):
    sampled, _ = sample(path, Failing([2, 3, 1], []))
    assert not [name for name in sampled.statistics if "failures" in name or "unchecked" in name]
    assert not [tag for tag in rollout_metrics(sampled, 0) if "failures" in tag or "unchecked" in tag]
    assert b"failure" not in carry_over.serialize_groups(sampled.groups)


def test_a_group_of_failures_alone_is_dropped(path):
    settings = replace(MANY, dynamic_sampling=False)
    sampled, _ = sample(path, Failing([2, 3, 1, 2, 2], [f"0/{n}" for n in range(4)]), settings)
    assert {group.prompt.id for group in sampled.groups} == {"1", "2", "3"}
    assert sampled.statistics["groups_unchecked"] == 1


def test_a_group_with_one_verdict_has_no_advantage(path):
    settings = replace(MANY, dynamic_sampling=False)
    sampled, _ = sample(path, Failing([2, 3, 1], ["0/1", "0/2", "0/3"]), settings)
    [group] = [group for group in sampled.groups if group.prompt.id == "0"]
    assert [t.advantage for t in compute_advantages([group], AlgorithmConfig())[0].trajectories] == [0.0] * 4


def test_failures_that_count_as_wrong_are_counted_too(path):
    sampled, _ = sample(path, Failing([2, 3, 1], ["0/0"], mask=False))
    first = next(group for group in sampled.groups if group.prompt.id == "0").trajectories[0]
    assert (first.reward, first.accuracy, first.mask.all()) == (-1.0, 0, True)
    assert sampled.statistics["failures_timeout"] == 1
    assert rollout_metrics(sampled, 0)["rollout/accuracy"] == (1 + 3 + 1) / 12


def test_masked_responses_keep_their_failure_in_files(path):
    sampled, _ = sample(path, Failing([2, 3, 1], ["0/0"]))
    again, _ = carry_over.deserialize_groups(carry_over.serialize_groups(sampled.groups))
    assert [[t.failure for t in group.trajectories] for group in again] == [
        [t.failure for t in group.trajectories] for group in sampled.groups
    ]
    assert [GroupRecord.of(group, 0) for group in again] == list(sampled.records)


@pytest.mark.parametrize("mask", [True, False])
def test_too_many_failures_end_the_step_and_the_prompts_are_sampled_again(path, mask):
    """3 of 12 answers fail. The repaired verifier sees the same responses again, and no prompt is lost."""
    failing = Failing([2, 3, 1, 2], ["0/0", "2/0", "2/1"], mask=mask)
    repaired = Prompts([2, 3, 1, 2])

    async def run():
        sampler = Sampler(EmbeddedEngine(path), SETTINGS, failing.score)
        with pytest.raises(VerifierError, match=r"failed on \d of \d+ answers .*max_failure_fraction = 0\.1"):
            await sampler.step(failing, 0)
        groups, partial = carry_over.deserialize_groups(carry_over.serialize_groups(*sampler.carried()))
        assert {group.prompt.id for group in groups} | {one.prompt.id for one in partial} == {"0", "1", "2"}
        assert not [t for group in groups for t in group.trajectories if t.failure]
        after = Sampler(EmbeddedEngine(path), SETTINGS, repaired.score)
        after.restore(groups, partial)
        return await after.step(lambda count: [], 0)

    sampled = asyncio.run(run())
    whole, _ = sample(path, Prompts([2, 3, 1, 2]))
    responses = {t.name: t.tokens.tolist() for group in sampled.groups for t in group.trajectories}
    assert responses == {t.name: t.tokens.tolist() for group in whole.groups for t in group.trajectories}


def test_prompts_begun_early_are_neither_lost_nor_begun_twice_if_the_verifier_fails(path):
    """Prompts 1 and 2 are dropped, 3 and 4 begun in their place; then 4 of 20 checks turn out to have failed."""
    failing = Failing([2, 0, 4, 2, 2, 2], ["0/0", "3/0", "3/2", "4/0"], mask=True)

    async def run():
        sampler = Sampler(EmbeddedEngine(path), replace(SETTINGS, max_failure_fraction=0.17), failing.score)
        with pytest.raises(VerifierError, match="max_failure_fraction"):
            await sampler.step(failing, 0)
        groups, partial = sampler.carried()
        return [group.prompt.id for group in groups], [one.prompt.id for one in partial], sampler.statistics

    groups, partial, statistics = asyncio.run(run())
    assert statistics["prompts_begun_early"] == 2
    carried = sorted(map(int, [*groups, *partial]))
    assert len({*carried}) == len(carried)
    assert {0, 3, 4} <= {*carried}
    assert failing.given == 5, "prompt 5 was not begun"
    assert max(carried) < failing.given


def test_a_verifier_that_never_works_ends_the_step_early(path):
    """The step ends as soon as the share is certain to be too large, not after all of its responses."""
    prompts = Failing([2] * 50, [f"{n}/{m}" for n in range(50) for m in range(4)])
    asked = []

    async def score(trajectory):
        asked.append(trajectory.name)
        return await prompts.score(trajectory)

    async def run():
        sampler = Sampler(EmbeddedEngine(path), replace(SETTINGS, prompts_per_step=50), score)
        with pytest.raises(VerifierError, match="no verdict on 0/0"):
            await sampler.step(prompts, 0)
        return sampler.carried()

    groups, partial = asyncio.run(run())
    assert len(asked) < 100
    assert not groups
    assert [one.prompt.id for one in partial] == [str(n) for n in range(50)]


def test_a_verifier_that_raises_ends_the_step_with_its_text(path):
    prompts = Prompts([2] * 3)
    running = []

    async def score(trajectory):
        running.append(trajectory.name)
        try:
            if trajectory.name == "1/2":
                raise VerifierError("its process does not start")
            await asyncio.sleep(30)
        finally:
            running.remove(trajectory.name)

    async def run():
        sampler = Sampler(EmbeddedEngine(path), SETTINGS, score)
        with pytest.raises(VerifierError, match="its process does not start"):
            await sampler.step(prompts, 0)
        assert not running, "the other checks are cancelled"
        return sampler.carried()

    groups, partial = asyncio.run(asyncio.wait_for(run(), 20))
    assert (groups, len(partial)) == ([], 3)


def test_counts_over_ranks():
    one, two = CheckCounts(), CheckCounts()
    for failure in ("", "", "timeout"):
        one.add(failure, "slow")
    for failure in ("error", "timeout", ""):
        two.add(failure, "bad")
    total = CheckCounts.total([one, two])
    assert (total.checks, total.failures) == (6, {"timeout": 2, "error": 1})
    assert total.texts == {"timeout": "slow", "error": "bad"}
    assert total.exceeds(0.49)
    assert not total.exceeds(0.5)
    assert not CheckCounts().exceeds(0)
    one.clear()
    one.add("error", "x")
    assert one.exceeds(1.0), "no verdict at all"
    assert np.isclose(total.failed, 3)
