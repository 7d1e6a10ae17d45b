"""Recorded passes: the bits of the model's own passes, whatever is replaced between them; never a wrong recording."""

import asyncio
import gc
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fipo_megatron.rollout.embedded import recorded_pass
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.embedded.recorded_pass import RecordedPasses, record
from fipo_megatron.rollout.engine import GenerationRequest, SamplingParameters
from tests.actor.models import random_model

CONTEXT = 256
NEVER = 10**9


@pytest.fixture(params=["qwen3", "llama3", "qwen3 moe"])
def name(request):
    return request.param


def model(name, seed=0):
    return random_model(name, seed, max_position_embeddings=CONTEXT)


async def sampled(engine, first, count, longest):
    """Responses of uneven lengths: passes of several widths, and a cache that grows in between."""
    requests = []
    for number in range(first, first + count):
        tokens = np.random.default_rng(number).integers(0, 61, 3 + 7 * number % 50).astype(np.int32)
        sampling = SamplingParameters(temperature=1.0, max_tokens=1 + 5 * number % longest)
        requests.append(GenerationRequest(str(number), str(number), tokens, sampling, seed=number))
    found = await asyncio.gather(*(engine.generate(each) for each in requests))
    return [(response.tokens.tolist(), response.log_probs.tobytes()) for response in found]


async def run_of(path, other):
    """Three batches: the second with longer responses, the third after the memory was released, with new weights."""
    engine = EmbeddedEngine(path, slots=32)
    found = [await sampled(engine, 0, 40, 20), await sampled(engine, 60, 20, 70)]
    recorded = len(engine._model._pass)
    engine.update_weights(weights_of(other).items(), 1)
    found.append(await sampled(engine, 100, 40, 20))
    await engine.release_memory("weights", "kv_cache")
    assert len(engine._model._pass) == 0
    await engine.restore_memory("weights", "kv_cache")
    engine.update_weights(weights_of(other).items(), 2)
    found.append(await sampled(engine, 100, 40, 20))
    await engine.close()
    return found, recorded


def test_an_engine_that_records_at_once_gives_the_same_bits(name, tmp_path, monkeypatch):
    model(name).save_pretrained(tmp_path)
    results = {}
    for after in (1, NEVER):
        monkeypatch.setattr(recorded_pass, "RECORD_AFTER", after)
        results[after], recorded = asyncio.run(run_of(tmp_path, model(name, seed=1)))
        assert (recorded > 0) == (after == 1 and name != "qwen3 moe"), "a mixture's shapes depend on its tokens"
    assert results[1] == results[NEVER]
    assert results[1][2] == results[1][3], "the same weights, read and released in between"


def test_a_shape_is_recorded_after_a_number_of_passes(monkeypatch):
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 3)
    calls = []
    passes = RecordedPasses(lambda x: (calls.append(0), x + 1)[1])
    for number in range(5):
        assert passes(torch.full((2,), float(number))).tolist() == [number + 1] * 2
    assert passes(torch.ones(3)).tolist() == [2.0] * 3
    assert len(passes) == 1
    assert len(calls) == 3 + 1 + 1 + 1, "three passes, the recording, its check, and the other shape"


def test_the_recordings_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    monkeypatch.setattr(recorded_pass, "KEPT", 2)
    passes = RecordedPasses(lambda x: x + 1)
    for length in (1, 1, 2, 2, 1, 3, 3):  # two passes record a shape; then 1 is used before 3 takes the place of 2
        passes(torch.zeros(length))
        assert len(passes) <= 2
    assert {shape[0] for (shape,) in passes._recorded} == {1, 3}
    for _ in range(2):
        assert passes(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert {shape[0] for (shape,) in passes._recorded} == {3, 2}, "what was dropped can be recorded again"


def test_held_tensors_are_read_and_written_at_the_time_of_the_replay():
    weight, total, calls = torch.randn(4, 3), torch.zeros(4), torch.zeros(1)

    def function(x):
        calls.add_(1)
        product = torch.cat([x, x])[:3] @ weight.t()
        total.add_(product.sum(0))
        return product.view(-1).softmax(0)

    recorded = record(function, torch.randn(2, 3))
    assert calls.item() == 1
    weight.mul_(3)
    for _ in range(2):
        x = torch.randn(2, 3)
        total.zero_()
        want, want_total = function(x), total.clone()
        total.zero_()
        assert torch.equal(recorded(x), want)
        assert torch.equal(total, want_total)
    assert calls.item() == 1 + 2 + 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: x * (2 if x.sum() > 0 else 3),
        lambda x: x[: int(x.abs().max())],
        lambda x: x.masked_select(x > 0).sum(),
    ],
    ids=["selection", "branch", "length", "inner shape"],
)
def test_what_depends_on_the_data_is_not_recorded(function, monkeypatch, caplog):
    x = torch.tensor([1.5, -2.0, 3.0])
    with pytest.raises((ValueError, RuntimeError)):
        record(function, x)
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    passes = RecordedPasses(function)
    with caplog.at_level("INFO"):
        for each in (x, -x, x.flip(0)):
            assert torch.equal(passes(each), function(each))
    assert len(passes) == 0
    assert "passes are not recorded" in caplog.text


@pytest.mark.parametrize(
    "function",
    [lambda x: x * (x.tolist()[0] > 2), lambda x: torch.cat(x.split([int(x.numpy()[0]), 3 - int(x.numpy()[0])])[::-1])],
    ids=["tolist", "numpy"],
)
def test_values_read_past_the_operators_are_not_recorded(function, monkeypatch, caplog):
    """The pass that a recording is compared with may have the same ones, as when experts get equal counts of tokens."""
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    passes = RecordedPasses(function)
    with caplog.at_level("INFO"):
        for number in (1.0, 1.0, 2.0, 3.0):
            x = torch.tensor([number, 5.0, 7.0])
            assert torch.equal(passes(x), function(x))
    assert len(passes) == 0
    assert "past the operators" in caplog.text


def test_a_recording_is_used_only_if_it_gives_the_bits_of_another_pass(monkeypatch, caplog):
    """A value of Python that changes between passes is a part of the recording."""
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    values = iter(range(100))
    passes = RecordedPasses(lambda x: x + next(values))
    with caplog.at_level("INFO"):
        for _ in range(5):
            passes(torch.zeros(2))
    assert len(passes) == 0
    assert "other bits" in caplog.text


def test_operators_may_return_more_than_tensors():
    """As torch's attention kernels do, which return the lengths of queries and keys, too."""
    library = torch.library.Library("recorded_pass_test", "DEF")
    library.define("mixed(Tensor x) -> (Tensor, SymInt, Tensor?)")
    library.impl("mixed", lambda x: (x * 2, len(x), None), "CPU")

    def function(x):
        product, length, nothing = torch.ops.recorded_pass_test.mixed(x)
        values = [product, x + 1]
        torch._foreach_add_(values, 1.0)  # returns nothing
        assert nothing is None
        return values[0] * length + values[1]

    recorded = record(function, torch.zeros(3))
    x = torch.randn(3)
    assert torch.equal(recorded(x), function(x))


def test_a_replay_that_fails_does_not_keep_the_pass_from_running(monkeypatch, caplog):
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    calls = iter(range(100))

    def fails_once(x):
        if next(calls) == 3:  # after a pass, its recording and another pass
            raise RuntimeError("out of memory")
        return x * 2

    library = torch.library.Library("recorded_pass_failure_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", fails_once, "CPU")
    passes = RecordedPasses(torch.ops.recorded_pass_failure_test.twice)
    with caplog.at_level("INFO"):
        for _ in range(4):
            assert passes(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(passes) == 0
    assert "RuntimeError: out of memory" in caplog.text


@contextmanager
def without_collection():
    """Objects are freed by their reference counts alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Watched:
    """Tells which of some tensors' memory is free."""

    def __init__(self, tensors):
        self._storages = [tensor.untyped_storage()._weak_ref() for tensor in tensors]

    def freed(self):
        return [torch.UntypedStorage._expired(storage) for storage in self._storages]


def test_a_pass_takes_no_more_memory_while_it_is_recorded():
    made, alive = [], []

    def function(x):
        made.clear()
        for _ in range(4):
            x = (x * 2).view(-1)
            made.append(Watched([x]))
            alive.append(sum(each.freed() == [False] for each in made))
        return x

    with without_collection():
        function(torch.ones(3))
        record(function, torch.ones(3))
    assert alive[4:] == alive[:4]
    assert max(alive) < 4


def test_memory_is_free_as_soon_as_it_is_released_or_its_engine_dropped(tmp_path, monkeypatch):
    """The memory is another's then: the actor's, or the next engine's."""
    monkeypatch.setattr(recorded_pass, "RECORD_AFTER", 1)
    model("qwen3").save_pretrained(tmp_path)

    async def used(release):
        engine = EmbeddedEngine(tmp_path, slots=32)
        await sampled(engine, 0, 40, 20)
        assert len(engine._model._pass)
        keys = [layer.keys for layer in engine._model._cache.layers]
        watched = Watched([*engine.model.parameters(), *keys])
        del keys
        if release:
            await engine.release_memory("weights", "kv_cache")
            assert all(watched.freed())
        await engine.close()
        return watched

    with without_collection():
        asyncio.run(used(True))
        assert all(asyncio.run(used(False)).freed())
