"""An abort that comes while a group is being begun leaves it as it was, whether its requests were made or not."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from fipo_megatron.data.trajectory import Prompt, Score
from fipo_megatron.rollout import carry_over
from fipo_megatron.rollout.carry_over import PartialGroup
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import SamplingParameters
from fipo_megatron.rollout.group_sampler import GroupSampler
from fipo_megatron.rollout.sampling_progress import SamplingProgress
from fipo_megatron.rollout.step_checks import CheckCounts
from tests.actor.models import random_model

SAMPLES = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_model("qwen3", max_position_embeddings=128).save_pretrained(path)
    return path


def group(number):
    tokens = np.random.default_rng(number).integers(0, 61, 5).astype(np.int32)
    return PartialGroup.new(Prompt(str(number), tokens, ""), SAMPLES)


async def abort_after(turns, path):
    """Two groups end with the same token; the first is replaced, the second aborts some turns later."""
    engine, counts = EmbeddedEngine(path, slots=16), Counter()
    requested = []

    async def score(trajectory):
        return Score(1.0, 1)

    async def decide(complete):
        if complete.prompt.id == "0":
            return group(2)
        for _ in range(turns):
            await asyncio.sleep(0)
        requested.append(len(engine._waiting))
        await sampler.abort()
        return None

    sampler = GroupSampler(
        engine,
        SamplingParameters(temperature=1.0, max_tokens=1),
        run_seed=3,
        keep_partial=True,
        scorer=score,
        counts=counts,
        checks=CheckCounts(),
        progress=SamplingProgress(),
        on_response=lambda: None,
    )
    left = await sampler.sample_batch([group(0), group(1)], decide)
    await engine.close()
    return requested[0], carry_over.serialize_groups([], left), dict(+counts)


def test_requests_that_are_aborted_before_their_first_token_leave_no_trace(path):
    found = [asyncio.run(abort_after(turns, path)) for turns in range(8)]
    assert {requested for requested, _, _ in found} >= {0, SAMPLES}, "some aborts come before the requests, some after"
    assert all(left == found[0][1] for _, left, _ in found)
    assert all(counts == found[0][2] for _, _, counts in found)
