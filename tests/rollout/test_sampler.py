"""The sampler with the embedded engine and fixed verdicts: the groups of a step are those computed by hand."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from fipo_megatron.data.trajectory import Prompt, Score
from fipo_megatron.rollout import carry_over
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.engine import GenerationRequest, SamplingParameters, sampling_seed
from fipo_megatron.rollout.sampler import Sampler, SamplingExhaustedError
from fipo_megatron.rollout.sampler_settings import SamplerSettings
from tests.actor.models import random_model

SETTINGS = SamplerSettings(
    prompts_per_step=3, samples_per_prompt=4, sampling=SamplingParameters(1.0, 12), run_seed=5, max_batches=3
)


def model(seed=0):
    return random_model("qwen3", seed, max_position_embeddings=256)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


class Prompts:
    """Prompts of which number n has ``right[n]`` right responses; the id is the number."""

    def __init__(self, right, longest=None):
        self.right, self.given, self.asked = right, 0, []

    def __call__(self, count):
        self.asked.append(count)
        numbers = range(self.given, min(self.given + count, len(self.right)))
        self.given = numbers.stop
        generator = np.random.default_rng(0)
        tokens = [generator.integers(0, 61, 5 + n) for n in range(len(self.right))]
        return [Prompt(str(n), tokens[n].astype(np.int32), "") for n in numbers]

    async def score(self, trajectory):
        right = trajectory.sample < self.right[int(trajectory.prompt.id)]
        return Score(1.0 if right else -1.0, int(right))


def names(groups):
    return [int(group.prompt.id) for group in groups]


def run(engine, settings, prompts, steps=1, state=None, versions=None):
    async def go():
        sampler = Sampler(engine, settings, prompts.score)
        if state is not None:
            sampler.restore(*carry_over.deserialize_groups(state))
        found = []
        for step in range(steps):
            sampled = await sampler.step(prompts, versions[step] if versions else 0)
            found.append((sampled.groups, dict(sampled.statistics)))
        return sampler, found

    return asyncio.run(go())


def test_kept_refilled_and_carried_as_computed_by_hand(path):
    """Prompts 0 1 2, of which 1 is kept; 3 4 in place of 0 2, of which 3 is kept; and 5 in place of 4."""
    prompts = Prompts([0, 2, 4, 1, 4, 3, 2, 2])
    _, [(groups, statistics)] = run(EmbeddedEngine(path), SETTINGS, prompts)
    assert (prompts.asked, prompts.given) == ([3, 3], 6)
    assert names(groups) == [1, 3, 5]
    assert {k: v for k, v in statistics.items() if v} == {
        "batches": 2,
        "prompts_begun_early": 3,
        "tokens_sampled": 6 * 4 * 12,
        "response_tokens_sampled": 6 * 4 * 12,
        "responses_sampled": 6 * 4,
        "responses_judged": 6 * 4,
        "responses_right": 0 + 2 + 4 + 1 + 4 + 3,
        "groups_sampled": 6,
        "groups_kept": 3,
        "groups_all_wrong": 1,
        "groups_all_right": 2,
    }
    for group in groups:
        assert [t.sample for t in group.trajectories] == [0, 1, 2, 3]
        assert sum(t.accuracy for t in group.trajectories) == prompts.right[int(group.prompt.id)]
        assert all(len(t.tokens) == 12 and t.finish_reason == "length" for t in group.trajectories)
        assert len({t.tokens.tobytes() for t in group.trajectories}) == 4


def test_without_dynamic_sampling_all_are_kept(path):
    prompts = Prompts([0, 4, 2, 1])
    _, [(groups, _)] = run(EmbeddedEngine(path), replace(SETTINGS, dynamic_sampling=False), prompts)
    assert sorted(names(groups)) == [0, 1, 2]
    assert prompts.asked == [3]


@pytest.mark.parametrize(
    ("right", "reason"),
    [
        ([0, 2, 4, 0, 0, 4, 0, 0, 2], r"after 3 batches of prompts \(rollout.max_generation_batches = 3\)"),
        ([0, 2, 0], r"after 1 batches of prompts; data.epochs is used up, there are no more prompts"),
    ],
)
def test_a_step_without_enough_groups_ends_as_configured(right, reason, path):
    """Sampling ends after three batches, or when there are no more prompts."""
    prompts = Prompts(right)
    with pytest.raises(SamplingExhaustedError, match=f"1 of 3 groups {reason}") as raised:
        run(EmbeddedEngine(path), SETTINGS, prompts)
    assert raised.value.out_of_prompts == (len(right) == 3)
    _, [(groups, statistics)] = run(EmbeddedEngine(path), replace(SETTINGS, on_exhausted="smaller"), Prompts(right))
    assert names(groups) == [1]
    assert statistics["batches"] == (3 if len(right) > 3 else 1)


SMALLER = replace(SETTINGS, on_exhausted="smaller", max_batches=1, max_empty_steps=3)


def test_empty_steps_are_warned_of_and_end_the_run(path, caplog):
    """Two empty steps, one group, then three empty steps: the count begins anew after a step with a group."""
    prompts = Prompts([0] * 3 + [4] * 3 + [2] + [0] * 20)

    async def go():
        sampler, sizes = Sampler(EmbeddedEngine(path), SMALLER, prompts.score), []
        for _ in range(9):
            try:
                sizes.append(len((await sampler.step(prompts, 0)).groups))
            except SamplingExhaustedError as error:
                return sizes, error
        return sizes, None

    sizes, error = asyncio.run(go())
    assert sizes == [0, 0, 1, 0, 0]
    assert "no group was kept in each of 3 steps (rollout.max_empty_steps = 3); in the last one: " in str(error)
    assert "'groups_all_wrong': 3" in str(error)
    assert not error.out_of_prompts
    assert caplog.text.count("nothing to learn from in this step: 0 of 3 groups after 1 batches") == 4


def test_smaller_steps_end_with_the_prompts(path):
    """The last group is used; the step after it has no prompts at all, and is no smaller step."""
    prompts = Prompts([2, 0])
    settings = replace(SMALLER, max_empty_steps=100)
    _, [(groups, _)] = run(EmbeddedEngine(path), settings, prompts)
    assert names(groups) == [0]
    with pytest.raises(SamplingExhaustedError, match=r"data\.epochs is used up") as raised:
        run(EmbeddedEngine(path), settings, prompts)
    assert raised.value.out_of_prompts


def test_groups_have_the_order_of_their_prompts_not_that_in_which_they_finished(path):
    sampling = SamplingParameters(1.0, 60, stop_token_ids=tuple(range(0, 61, 6)))
    engine = Recorder(EmbeddedEngine(path, slots=64))
    settings = replace(SETTINGS, sampling=sampling, prompts_per_step=8)
    _, [(groups, _)] = run(engine, settings, Prompts([2] * 8))
    ends = {number: place for place, (kind, number) in enumerate(engine.events) if kind == "ended"}
    assert sorted(ends, key=ends.__getitem__) != list(range(8))
    assert names(groups) == list(range(8))


def test_prompts_that_were_begun_early_are_counted_at_the_end_of_the_data(path):
    """All of six prompts are dropped, three of them begun in place of others: there are no more."""
    with pytest.raises(SamplingExhaustedError, match="there are no more prompts") as raised:
        run(EmbeddedEngine(path), replace(SETTINGS, prompts_per_step=4, max_batches=2), Prompts([0] * 6))
    assert raised.value.out_of_prompts


def test_a_cancelled_step_gives_back_what_it_did_not_begin(path):
    prompts = Prompts([0, 0, 2, 2, 2, 2, 2, 2])

    async def go():
        sampler = Sampler(EmbeddedEngine(path), SETTINGS, prompts.score)
        step = asyncio.create_task(sampler.step(prompts, 0))
        while not sampler.statistics["groups_sampled"]:
            await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        return [int(one.prompt.id) for one in sampler.carried()[1]]

    carried = asyncio.run(go())
    assert sorted(carried) == list(range(prompts.given))


def test_groups_kept_before_the_error_are_carried(path):
    prompts = Prompts([2, 0, 0, 0, 0, 0, 0, 2, 2, 2])

    async def go():
        sampler = Sampler(EmbeddedEngine(path), replace(SETTINGS, max_batches=2), prompts.score)
        with pytest.raises(SamplingExhaustedError):
            await sampler.step(prompts, 0)
        return [names((await sampler.step(prompts, 0)).groups), prompts.asked]

    groups, asked = asyncio.run(go())
    # 0 1 2, and 3 4 5 in place of 1 2 3. Then, 0 being carried, 6 7, and 8 in place of 6.
    assert asked == [3, 3, 2, 2]
    assert groups == [0, 7, 8]


def test_surplus_groups_are_carried_to_the_next_step(path):
    """Six groups, twice as many as missing, are complete at the same token; three of them are surplus."""
    prompts = Prompts([2] * 12)
    settings = replace(SETTINGS, over_sampling=2.0)
    _, found = run(EmbeddedEngine(path), settings, prompts, steps=3)
    assert prompts.asked == [6, 6, 6, 6]  # in the first and the third step: a batch, and one that is given back
    assert prompts.given == 12
    assert [statistics["groups_carried_in"] for _, statistics in found] == [0, 3, 0]
    assert sorted(names(found[0][0]) + names(found[1][0])) == list(range(6))
    assert found[1][1].get("batches", 0) == 0


class Recorder:
    """The embedded engine; records the prompts of requests and results in order."""

    def __init__(self, engine):
        self.engine, self.events = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def generate(self, request):
        self.events.append(("begun", int(request.group)))
        found = await self.engine.generate(request)
        self.events.append(("ended", int(request.group)))
        return found


@pytest.mark.parametrize("slots", [16, 64])
def test_a_prompt_is_begun_in_place_of_a_dropped_group_while_others_are_sampled(slots, path):
    """The next batch does not wait for the slowest response, and the groups are the same as if it did."""
    right = [4, 0, 0, 2, 2, 4, 2, 0, 2, 2]
    prompts = Prompts(right)
    sampling = SamplingParameters(1.0, 60, stop_token_ids=tuple(range(0, 61, 6)))
    settings = replace(SETTINGS, sampling=sampling, prompts_per_step=4, max_batches=10)
    engine = Recorder(EmbeddedEngine(path, slots=slots))
    sampler, [(groups, statistics)] = run(engine, settings, prompts)
    first_batch_ends = max(
        place for place, (kind, number) in enumerate(engine.events) if kind == "ended" and number < 4
    )
    assert ("begun", 4) in engine.events[:first_batch_ends]
    assert names(groups) == [3, 4, 6, 8], "in the order of the prompts"
    assert prompts.asked == [4, 4, 1, 1]  # 8 waits for the end of the others: the spare prompts are used up
    assert prompts.given == 9, "a prompt that was not begun is given back"
    assert (statistics["prompts_begun_early"], statistics["groups_sampled"], statistics["batches"]) == (4, 9, 3)
    assert sampler.carried() == ([], [])
    alone = EmbeddedEngine(path, slots=16)
    for group in groups:
        for trajectory in group.trajectories:
            seed = sampling_seed(5, group.prompt.id, trajectory.sample, 0)
            request = GenerationRequest("", "", group.prompt.tokens, sampling, seed)
            assert asyncio.run(alone.generate(request)).tokens.tolist() == trajectory.tokens.tolist()


LONG = replace(
    SETTINGS, over_sampling=2.0, max_staleness=1, sampling=SamplingParameters(1.0, 60, stop_token_ids=(7, 9))
)


def test_the_tail_is_aborted_and_continued_with_the_next_weights(path):
    """Spans and versions are consistent, no group is returned twice, and every response is complete."""
    prompts = Prompts([2] * 40)
    engine = EmbeddedEngine(path, slots=16, weight_version=1)

    async def go():
        sampler = Sampler(engine, LONG, prompts.score)
        steps = [(await sampler.step(prompts, 1)).groups]
        aborted = sampler.statistics["responses_aborted"]
        carried = sampler.statistics["prompts_carried_out"]
        engine.update_weights(weights_of(model(seed=3)).items(), 2)
        steps.append((await sampler.step(prompts, 2)).groups)
        return steps, aborted, carried, dict(sampler.statistics)

    steps, aborted, carried, statistics = asyncio.run(go())
    assert aborted > 0
    assert carried > 0
    assert statistics["prompts_carried_in"] > 0
    assert statistics["responses_continued"] > 0
    seen = names(steps[0]) + names(steps[1])
    assert len(seen) == len({*seen}) == 6
    everything = [t for groups in steps for group in groups for t in group.trajectories]
    assert all(len(group.trajectories) == 4 for groups in steps for group in groups)
    for t in everything:
        assert t.finish_reason == ("stop" if t.tokens[-1] in (7, 9) else "length")
        assert not {7, 9} & {*t.tokens[:-1].tolist()}
        assert len(t.tokens) == 60 or t.finish_reason == "stop"
    mixed = [t for t in everything if len(t.spans) == 2]
    assert mixed
    assert all([span.weight_version for span in t.spans] == [1, 2] for t in mixed)


def test_nothing_stale_is_used(path):
    """Aborted responses restart without staleness; with it, only those older than allowed do."""
    for allowed, versions, restarted in ((0, [1, 2], None), (1, [1, 3], True), (2, [1, 3], False)):
        prompts = Prompts([2] * 60)
        engine = EmbeddedEngine(path, slots=16, weight_version=1)
        settings = replace(LONG, max_staleness=allowed)

        async def go(engine=engine, settings=settings, prompts=prompts, versions=versions):
            sampler = Sampler(engine, settings, prompts.score)
            await sampler.step(prompts, versions[0])
            engine.update_weights(weights_of(model()).items(), versions[1])
            sampled = await sampler.step(prompts, versions[1])
            return sampled.groups, sampler.statistics

        groups, statistics = asyncio.run(go())
        used = {span.weight_version for group in groups for t in group.trajectories for span in t.spans}
        assert min(used) >= versions[1] - allowed
        if restarted is not None:
            assert bool(statistics["prompts_restarted_stale"] + statistics["groups_dropped_stale"]) == restarted


def test_aborted_groups_are_restarted_as_a_whole(path):
    """Finished responses of an aborted group are sampled again if no staleness is allowed."""

    async def go():
        prompts = Prompts([2] * 60)
        sampler = Sampler(EmbeddedEngine(path, slots=16), replace(LONG, max_staleness=0), prompts.score)
        carried = []
        for _ in range(3):
            groups = (await sampler.step(prompts, 0)).groups
            assert all(len(group.trajectories) == 4 for group in groups)
            carried += sampler.carried()[1]
        return carried

    carried = asyncio.run(go())
    assert carried
    assert all((len(one.finished), len(one.partial)) == (0, 4) for one in carried)
    assert not any(len(response.tokens) for one in carried for response in one.partial)


def test_the_length_of_dropped_responses_is_counted(path):
    """Nothing may be old: surplus groups are dropped with the next weights, aborted responses start again at once."""
    prompts = Prompts([2] * 60)
    settings = replace(LONG, max_staleness=0)

    async def go():
        engine = EmbeddedEngine(path, slots=16)
        sampler, dropped = Sampler(engine, settings, prompts.score), []
        first = await sampler.step(prompts, 0)
        while not sampler.carried()[0]:
            first = await sampler.step(prompts, 0)
        dropped = [len(t.tokens) for group in sampler.carried()[0] for t in group.trajectories]
        engine.update_weights(weights_of(model()).items(), 1)
        return first.statistics, dropped, (await sampler.step(prompts, 1)).statistics

    first, dropped, second = asyncio.run(go())
    assert first["responses_restarted"] > 0
    assert first["tokens_restarted"] >= first["responses_restarted"]
    assert (second["responses_dropped"], second["tokens_dropped"]) == (len(dropped), sum(dropped))


def test_carried_responses_that_are_longer_than_a_lowered_limit_start_again(path, caplog):
    """A complete group, finished responses and tokens of unfinished ones, each longer than the limit of the resume."""
    prompts = Prompts([2] * 60)
    settings = replace(LONG, over_sampling=3.0)
    sampler, _ = run(EmbeddedEngine(path, slots=16), settings, prompts, steps=3)
    groups, partial = sampler.carried()
    assert max(len(r.tokens) for one in partial for r in one.partial) >= 8
    lowered = replace(settings, sampling=replace(settings.sampling, max_tokens=8))

    async def go():
        after = Sampler(EmbeddedEngine(path, slots=16), lowered, prompts.score)
        after.restore(groups, partial)
        left = {one.prompt.id for part in after.carried() for one in part}
        return left, [group for _ in range(3) for group in (await after.step(prompts, 0)).groups]

    left, found = asyncio.run(go())
    assert left == {one.prompt.id for one in (*groups, *partial)}, "no prompt is lost"
    assert max(len(t.tokens) for group in found for t in group.trajectories) == 8
    assert (
        "carried prompts start again: responses to them are longer than rollout.max_response_tokens = 8" in caplog.text
    )


def test_a_restored_sampler_continues_identically(path):
    def both(restored):
        prompts = Prompts([2] * 60)
        engine = EmbeddedEngine(path, slots=16)
        sampler, [(first, _)] = run(engine, LONG, prompts)
        state = carry_over.serialize_groups(*sampler.carried())
        assert len(state) > 3000
        if not restored:
            engine = EmbeddedEngine(path, slots=16)
        given = prompts.given
        fresh = Prompts(prompts.right)
        fresh.given = given
        _, [(second, statistics)] = run(engine, LONG, fresh, state=state)
        return first, second, statistics

    (_, left, left_statistics), (_, right, right_statistics) = both(False), both(True)
    assert left_statistics == right_statistics
    assert names(left) == names(right)
    for a, b in zip(left, right, strict=True):
        for t, u in zip(a.trajectories, b.trajectories, strict=True):
            assert t.tokens.tobytes() == u.tokens.tobytes()
            assert t.behaviour_log_probs.tobytes() == u.behaviour_log_probs.tobytes()
            assert (t.spans, t.reward, t.accuracy, t.finish_reason) == (u.spans, u.reward, u.accuracy, u.finish_reason)


def test_an_error_of_the_engine_ends_the_step(path):
    prompts = Prompts([2] * 6)
    engine = EmbeddedEngine(path)

    async def go():
        await engine.release_memory("weights")
        await Sampler(engine, SETTINGS, prompts.score).step(prompts, 0)

    with pytest.raises(RuntimeError, match="were released"):
        asyncio.run(go())


def test_results_do_not_depend_on_how_long_scoring_takes(path):
    """The tail is aborted after a number of tokens, even if verdicts are late and in another order."""

    def sampled(seconds):
        prompts = Prompts([2] * 60)
        random = np.random.default_rng(int(seconds * 1000))

        async def score(trajectory):
            await asyncio.sleep(seconds * random.random())
            return await Prompts.score(prompts, trajectory)

        async def go():
            sampler = Sampler(EmbeddedEngine(path, slots=16), LONG, score)
            groups = [group for _ in range(2) for group in (await sampler.step(prompts, 0)).groups]
            partial = [r for one in sampler.carried()[1] for r in one.partial]
            return names(groups), [(r.prompt.id, r.sample, r.tokens.tolist()) for r in partial]

        return asyncio.run(go())

    immediate = sampled(0)
    assert immediate[1]
    for _ in range(3):
        assert sampled(0.003) == immediate
    assert sampled(0.02) == immediate
