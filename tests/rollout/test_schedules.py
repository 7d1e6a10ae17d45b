"""Oversampling with carry-over under delayed verdicts: every schedule gives the same groups, bit for bit."""

import asyncio
import functools
import os

import numpy as np
import pytest

from fipo_megatron.data.trajectory import Prompt, Score
from fipo_megatron.rollout import carry_over
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.engine import SamplingParameters
from fipo_megatron.rollout.sampler import Sampler
from fipo_megatron.rollout.sampler_settings import SamplerSettings
from tests.actor.models import random_model

SCHEDULES = int(os.environ.get("FIPO_VERDICT_SCHEDULES", "10"))
SETTINGS = SamplerSettings(
    prompts_per_step=3,
    samples_per_prompt=4,
    sampling=SamplingParameters(1.0, 40, stop_token_ids=(7, 9)),
    run_seed=5,
    max_batches=6,
    over_sampling=2.0,
    max_staleness=1,
)
STEPS = 4


@functools.cache
def model(seed):
    return random_model("qwen3", seed, max_position_embeddings=128)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model(0).save_pretrained(path)
    return path


class Prompts:
    def __init__(self):
        self.given = 0

    def __call__(self, count):
        numbers = range(self.given, self.given + count)
        self.given += count
        return [
            Prompt(str(n), np.random.default_rng(n).integers(0, 61, 4 + n % 5).astype(np.int32), "") for n in numbers
        ]


class Delays:
    """Waits before and after everything that a driver does: turns of the event loop, and in some schedules seconds."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.turns = int(self.random.choice([4, 40, 200])) if seed else 0
        self.seconds = 0.004 if seed % 4 == 3 else 0.0

    async def __call__(self):
        for _ in range(self.random.integers(0, self.turns + 1)):
            await asyncio.sleep(0)
        if self.seconds and self.random.random() < 0.2:
            await asyncio.sleep(self.seconds * self.random.random())


class SlowEngine(EmbeddedEngine):
    """The embedded engine; if there is a delay, its caller notices a returned response late."""

    def __init__(self, *arguments, delay, **settings):
        super().__init__(*arguments, **settings)
        self.delay = delay

    async def generate(self, request):
        found = await super().generate(request)
        if self.delay:
            await self.delay()
        return found


async def steps_of(path, seed, late_returns):
    """Runs steps with new weights before each, half of them with a restored sampler; returns all bytes."""
    delay, prompts, found = Delays(seed), Prompts(), []
    engine = SlowEngine(path, slots=16, delay=delay if late_returns else None)

    async def score(trajectory):
        right = (int(trajectory.tokens.sum()) + trajectory.sample) % 3 == 0
        await delay()
        return Score(1.0 if right else -1.0, int(right))

    sampler = Sampler(engine, SETTINGS, score)
    for step in range(STEPS):
        engine.update_weights(weights_of(model(step % 2)).items(), step)
        sampled = await sampler.step(prompts, step)
        carried = carry_over.serialize_groups(*sampler.carried())
        found.append((carry_over.serialize_groups(sampled.groups), carried, dict(sampled.statistics), prompts.given))
        if step % 2:
            sampler = Sampler(engine, SETTINGS, score)
            sampler.restore(*carry_over.deserialize_groups(carried))
    await engine.close()
    return found


@pytest.mark.timeout(1200)
def test_every_schedule_of_verdicts_gives_the_same_groups(path):
    """Verdicts that take up to 200 turns of the event loop, or milliseconds, in any order, change no bit."""
    reference = asyncio.run(steps_of(path, 0, False))
    counts = [statistics for _, _, statistics, _ in reference]
    for name in ("responses_aborted", "responses_continued", "groups_carried_in", "prompts_carried_in"):
        assert sum(one[name] for one in counts if name in one), name
    different = [
        seed for seed in range(1, SCHEDULES + 1) if asyncio.run(steps_of(path, seed, seed % 2 == 0)) != reference
    ]
    print(f"\n{SCHEDULES} schedules of verdicts, {len(different)} with another result than without delays")
    assert not different
