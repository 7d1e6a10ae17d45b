"""The sampler with a real server: aborted responses are continued with the next weights; every group is complete."""

import asyncio

import numpy as np
import pytest

from fipo_megatron.data.trajectory import Prompt, Score
from fipo_megatron.rollout.engine import SamplingParameters
from fipo_megatron.rollout.sampler import Sampler
from fipo_megatron.rollout.sampler_settings import SamplerSettings
from tests.sglang import models
from tests.sglang.test_client import client_of

pytestmark = pytest.mark.sglang
SETTINGS = SamplerSettings(
    prompts_per_step=4,
    samples_per_prompt=3,
    sampling=SamplingParameters(1.0, 900, stop_token_ids=(5, 6)),
    over_sampling=3.0,
    max_staleness=1,
)


class Prompts:
    def __init__(self):
        self.given = 0

    def __call__(self, count):
        numbers = range(self.given, self.given + count)
        self.given += count
        return [
            Prompt(f"p{n}", np.random.default_rng(n).integers(2, models.VOCAB, 12).astype(np.int32), "")
            for n in numbers
        ]


def test_groups_over_an_update_of_the_weights(server, tmp_path):
    prompts = Prompts()

    async def score(trajectory):
        return Score(float(trajectory.sample), int(trajectory.sample == 0))

    async def run():
        client = client_of(server)
        sampler = Sampler(client, SETTINGS, score)
        try:
            payload = {"model_path": str(models.save(tmp_path / "a", seed=1)), "weight_version": "41"}
            await client.control("/update_weights_from_disk", payload)
            steps = [(await sampler.step(prompts, 41)).groups]
            first = dict(sampler.statistics)
            payload = {"model_path": str(models.save(tmp_path / "b", seed=2)), "weight_version": "42"}
            await client.control("/update_weights_from_disk", payload)
            steps += [(await sampler.step(prompts, 42)).groups for _ in range(2)]
            return steps, first
        finally:
            await client.close()

    steps, first = asyncio.run(run())
    assert first["responses_aborted"] > 0
    names = [group.prompt.id for groups in steps for group in groups]
    assert len(names) == len({*names}) == 12
    trajectories = [t for groups in steps for group in groups for t in group.trajectories]
    assert len(trajectories) == 36
    versions = {tuple(span.weight_version for span in t.spans) for t in trajectories}
    assert {(41,), (42,), (41, 42)} >= versions
    assert (41, 42) in versions
    for t in trajectories:
        assert len(t.tokens) == len(t.behaviour_log_probs)
        assert t.finish_reason == "stop" or len(t.tokens) == 900
