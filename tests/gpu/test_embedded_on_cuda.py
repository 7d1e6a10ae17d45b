"""The embedded engine on a GPU: log-probs of transformers, bits that do not depend on the batch, recorded passes."""

import asyncio

import numpy as np
import pytest
import torch

from fipo_megatron.rollout.embedded import recorded_pass
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.engine import GenerationRequest, SamplingParameters
from tests.actor.models import random_model

CONTEXT = 256


def model(seed=0):
    return random_model("qwen3", seed, max_position_embeddings=CONTEXT)


@pytest.fixture
def path(tmp_path):
    model().save_pretrained(tmp_path)
    return tmp_path


def request(number):
    tokens = np.random.default_rng(number).integers(0, 61, 3 + 17 * number % 60).astype(np.int32)
    sampling = SamplingParameters(temperature=0.8, max_tokens=10 + 13 * number % 70)
    return GenerationRequest(str(number), str(number), tokens, sampling, seed=number)


async def sampled(engine, numbers):
    return await asyncio.gather(*(engine.generate(request(number)) for number in numbers))


def bits(found):
    return [(each.tokens.tolist(), each.log_probs.tobytes()) for each in found]


def assert_log_probs(found, reference):
    for number, response in enumerate(found):
        ids = torch.from_numpy(np.concatenate([request(number).tokens, response.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, -len(response.tokens) - 1 : -1].double() / 0.8
        expected = logits.log_softmax(-1).gather(1, ids[-len(response.tokens) :, None])[:, 0].numpy()
        np.testing.assert_allclose(response.log_probs, expected, atol=2e-4)


def test_log_probs_are_those_of_transformers_with_every_weights(device, path):
    async def run():
        engine = EmbeddedEngine(path, slots=16, device=device)
        first = await sampled(engine, range(24))
        engine.update_weights(weights_of(model(seed=1)).items(), 1)
        second = await sampled(engine, range(24))
        await engine.close()
        return engine.model.device, first, second

    used, first, second = asyncio.run(run())
    assert used == device
    assert_log_probs(first, model())
    assert_log_probs(second, model(seed=1))


def test_results_depend_neither_on_the_batch_nor_on_recordings(device, path, monkeypatch):
    async def run(groups):
        engine = EmbeddedEngine(path, slots=64, device=device)
        found = [await sampled(engine, numbers) for numbers in groups]
        recorded = len(engine._model._pass)
        await engine.close()
        return bits([each for part in found for each in part]), recorded

    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 10**9)
    together, none = asyncio.run(run([range(60)]))
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 2)
    apart, some = asyncio.run(run([range(first, first + 12) for first in range(0, 60, 12)]))
    assert (none, some > 0) == (0, True)
    assert together == apart


def test_released_memory_is_free(device, path):
    async def run():
        engine = EmbeddedEngine(path, slots=256, device=device)
        await sampled(engine, range(64))
        before = torch.cuda.memory_allocated()
        await engine.release_memory("weights", "kv_cache")
        freed = before - torch.cuda.memory_allocated()
        weights = sum(parameter.numel() * parameter.itemsize for parameter in model().parameters())
        await engine.close()
        return freed, weights

    freed, weights = asyncio.run(run())
    assert freed >= weights
