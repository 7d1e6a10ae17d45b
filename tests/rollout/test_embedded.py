"""The embedded engine: its log-probs equal those of transformers, and no result depends on the rest of the batch."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from fipo_megatron.data.trajectory import TokenSpan
from fipo_megatron.rollout.embedded.drawing import draw
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine, weights_of
from fipo_megatron.rollout.embedded.pass_shapes import PassShapes
from fipo_megatron.rollout.engine import (
    EngineError,
    GenerationRequest,
    RequestError,
    SamplingParameters,
    sampling_seed,
)
from tests.actor.models import random_model

CONTEXT = 512


def models(name, seed=0):
    return random_model(name, seed, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            models(name).save_pretrained(made[name])
        return made[name]

    return save


def request(number, length=None, sampling=None, **changes):
    generator = np.random.default_rng(number)
    tokens = generator.integers(0, 61, length or 3 + 17 * number % 90).astype(np.int32)
    sampling = sampling or SamplingParameters(temperature=1.0, max_tokens=5 + 13 * number % 60)
    seed = sampling_seed(1, str(number), 0, 0)
    return replace(GenerationRequest(str(number), str(number), tokens, sampling, seed), **changes)


async def all_of(engine, requests):
    return await asyncio.gather(*(engine.generate(request) for request in requests))


def expected(model, request, found, temperature):
    ids = torch.from_numpy(np.concatenate([request.tokens, found.tokens]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double() / temperature
    log_probs = torch.log_softmax(logits, -1)[len(request.tokens) - 1 : -1]
    return log_probs.gather(1, ids[len(request.tokens) :, None])[:, 0].numpy()


def identical(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.log_probs.tobytes() == b.log_probs.tobytes()
        assert (a.spans, a.finish_reason) == (b.spans, b.finish_reason)


@pytest.mark.parametrize("name", ["qwen2", "qwen3 moe", "llama3"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_transformers(name, temperature, path):
    engine = EmbeddedEngine(path(name), slots=16)
    requests = [request(n, sampling=SamplingParameters(temperature, 40, 0.9 if n % 2 else 1.0)) for n in range(9)]
    for one, found in zip(requests, asyncio.run(all_of(engine, requests)), strict=True):
        assert len(found.tokens) == 40
        wanted = expected(models(name), one, found, temperature)
        np.testing.assert_allclose(found.log_probs, wanted, atol=1e-5, rtol=0)
        assert found.spans == (TokenSpan(0, 0),)
        assert found.finish_reason == "length"


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
def test_results_do_not_depend_on_the_rest_of_the_batch(name, path):
    """Requests have bitwise equal results alone, in another order, and together."""
    requests = [request(n) for n in range(40)]
    together = asyncio.run(all_of(EmbeddedEngine(path(name), slots=16), requests))
    assert len({found.tokens.tobytes() for found in together}) == 40
    backwards = asyncio.run(all_of(EmbeddedEngine(path(name), slots=16), requests[::-1]))
    identical(together, backwards[::-1])

    async def one_by_one():
        engine = EmbeddedEngine(path(name), slots=16)
        return [await engine.generate(one) for one in requests]

    identical(together, asyncio.run(one_by_one()))


def rows_of_passes(engine):
    """Returns a list to which the shape of the input ids of every pass is added."""
    shapes = []
    engine.model.register_forward_pre_hook(
        lambda _, __, arguments: shapes.append(tuple(arguments["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("equal_bits", [True, False])
def test_passes_are_as_wide_as_what_runs_if_that_changes_no_bit(path, monkeypatch, equal_bits):
    """More slots, narrower passes and moved sequences change no result; without equal bits, passes have all rows."""
    if not equal_bits:
        monkeypatch.setattr(PassShapes, "equal", lambda self, rows, more_rows, length: rows == more_rows)
    requests = [request(n) for n in range(70)]
    engine = EmbeddedEngine(path("qwen3"), slots=128)
    shapes = rows_of_passes(engine)
    found = asyncio.run(all_of(engine, requests))
    identical(found, asyncio.run(all_of(EmbeddedEngine(path("qwen3"), slots=16), requests)))
    widths = [rows for rows, length in shapes if length == 1]
    if not equal_bits:
        assert set(widths) == {128}
    elif engine._model._shapes.equal(16, 128, 1):
        assert widths[0] == 128
        assert widths[-1] == 16, "the longest responses run alone at last"
        reads = [rows for rows, length in shapes if length > 1]
        assert len(reads) < 40, "prompts are read in batches"


def test_prompts_of_a_mixture_are_read_one_by_one(path):
    """How many rows an expert gets depends on the other sequences, and so would the first token's log-prob."""
    requests = [request(n, 5, SamplingParameters(1.0, 1)) for n in range(12)]
    engine = EmbeddedEngine(path("qwen3 moe"), slots=64)
    shapes = rows_of_passes(engine)
    together = asyncio.run(all_of(engine, requests))
    assert {rows for rows, length in shapes if length > 1} == {1}
    identical(together, [asyncio.run(EmbeddedEngine(path("qwen3 moe"), slots=64).generate(one)) for one in requests])


def test_samples_of_a_prompt_differ_by_seed_alone(path):
    base = request(3)
    requests = [replace(base, id=str(n), seed=sampling_seed(1, "3", n, 0)) for n in range(6)]
    found = asyncio.run(all_of(EmbeddedEngine(path("qwen3")), [*requests, replace(requests[2], id="again")]))
    assert len({one.tokens.tobytes() for one in found[:6]}) == 6
    identical([found[2]], [found[6]])


def test_stop_tokens_end_a_response_and_belong_to_it(path):
    free = asyncio.run(all_of(EmbeddedEngine(path("qwen3")), [request(5, sampling=SamplingParameters(1.0, 50))]))[0]
    stop = int(free.tokens[20])
    first = free.tokens.tolist().index(stop)
    sampling = SamplingParameters(1.0, 50, stop_token_ids=(stop,))
    found = asyncio.run(all_of(EmbeddedEngine(path("qwen3")), [request(5, sampling=sampling)]))[0]
    assert found.finish_reason == "stop"
    assert found.tokens.tolist() == free.tokens[: first + 1].tolist()


async def until(engine, tokens):
    """Waits until the engine has sampled this many tokens of its first request."""
    while engine._running[0] is None or engine._table.counts[0] < tokens:
        await asyncio.sleep(0)


def test_pause_changes_nothing(path):
    async def paused():
        engine = EmbeddedEngine(path("qwen3"))
        task = asyncio.create_task(all_of(engine, [request(n) for n in range(6)]))
        await until(engine, 3)
        await engine.pause()
        count = engine._table.counts[0]
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine._table.counts[0] <= count + 1
        await engine.resume()
        return await task

    identical(asyncio.run(paused()), asyncio.run(all_of(EmbeddedEngine(path("qwen3")), [request(n) for n in range(6)])))


@pytest.mark.parametrize("paused", [False, True])
def test_an_aborted_response_is_continued_with_new_weights(path, paused):
    """Token counts, spans and versions are consistent, and every span has the log-probs of its own weights."""
    sampling = SamplingParameters(1.0, 60)
    new = models("qwen3", seed=7)

    async def run():
        engine = EmbeddedEngine(path("qwen3"), weight_version=4)
        first = request(2, 30, sampling)
        task = asyncio.create_task(all_of(engine, [first, request(9, 30, sampling)]))
        await until(engine, 11)
        if paused:
            await engine.pause()
        await engine.abort([first.id])
        while engine._running[0] is not None:
            await asyncio.sleep(0)
        engine.update_weights(weights_of(new).items(), 5)
        await engine.resume()
        part, other = await task
        assert part.finish_reason == "abort"
        rest_of = replace(
            first,
            tokens=np.concatenate([first.tokens, part.tokens]),
            sampling=replace(sampling, max_tokens=60 - len(part.tokens)),
            seed=sampling_seed(1, "2", 0, 1),
        )
        return first, part, rest_of, await engine.generate(rest_of), other

    first, part, rest_of, rest, other = asyncio.run(run())
    assert 11 <= len(part.tokens) < 60
    assert len(part.tokens) + len(rest.tokens) == 60
    assert (part.spans, rest.spans) == ((TokenSpan(0, 4),), (TokenSpan(0, 5),))
    np.testing.assert_allclose(part.log_probs, expected(models("qwen3"), first, part, 1.0), atol=1e-5)
    np.testing.assert_allclose(rest.log_probs, expected(new, rest_of, rest, 1.0), atol=1e-5)
    # The other response was not aborted, so it has two spans.
    assert other.finish_reason == "length"
    [old_span, new_span] = other.spans
    assert (old_span, new_span.weight_version) == (TokenSpan(0, 4), 5)
    start, whole = new_span.start, request(9, 30, sampling)
    np.testing.assert_allclose(other.log_probs[:start], expected(models("qwen3"), whole, other, 1.0)[:start], atol=1e-5)
    np.testing.assert_allclose(other.log_probs[start:], expected(new, whole, other, 1.0)[start:], atol=1e-5)
    assert np.abs(other.log_probs - expected(new, whole, other, 1.0))[:start].max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "qwen3 moe"])
def test_weights_that_do_not_fit_are_refused(name, path):
    engine = EmbeddedEngine(path(name))
    tensors = dict(weights_of(models(name)))
    removed, wrong = [key for key in tensors if "layers.1" in key][:2]
    del tensors[removed]
    tensors[wrong] = torch.zeros(3)
    tensors["more"] = torch.zeros(1)
    with pytest.raises(EngineError) as raised:
        engine.update_weights(tensors.items(), 1)
    assert f"{removed}: missing" in str(raised.value)
    assert f"{wrong} [3]: shape" in str(raised.value)
    assert "more [1]: no such tensor" in str(raised.value)
    with pytest.raises(EngineError, match="restore and update them"):
        asyncio.run(engine.generate(request(1)))


def test_released_weights_must_be_updated(path):
    async def run():
        engine = EmbeddedEngine(path("qwen3"))
        before = await engine.generate(request(4))
        task = asyncio.create_task(engine.generate(request(5)))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="requests are in flight"):
            await engine.release_memory("weights")
        await task
        await engine.release_memory("kv_cache", "weights")
        assert not sum(parameter.numel() for parameter in engine.model.parameters())
        with pytest.raises(EngineError, match="were released"):
            await engine.generate(request(4))
        await engine.restore_memory("weights")
        with pytest.raises(EngineError, match="were released"):
            await engine.generate(request(4))
        engine.update_weights(weights_of(models("qwen3")).items(), 1)
        await engine.restore_memory("kv_cache")
        after = await engine.generate(request(4))
        assert after.tokens.tolist() == before.tokens.tolist()
        assert (await engine.weight_version(), after.spans) == (1, (TokenSpan(0, 1),))
        assert (await engine.health())[0].running == 0

    asyncio.run(run())


def test_requests_that_can_never_be_served_are_refused(path):
    engine = EmbeddedEngine(path("qwen3"))
    for bad, text in (
        (request(1, CONTEXT - 10, SamplingParameters(1.0, 11)), f"do not fit into the model's context of {CONTEXT}"),
        (replace(request(1), tokens=np.array([61], dtype=np.int32)), "token 61 is not in the model's vocabulary"),
        (replace(request(1), tokens=np.array([], dtype=np.int32)), "has no tokens"),
    ):
        with pytest.raises(RequestError, match=text):
            asyncio.run(engine.generate(bad))
    for field in ({"temperature": 0.0}, {"max_tokens": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(RequestError, match=next(iter(field))):
            replace(SamplingParameters(1.0, 1), **field)
    assert len(asyncio.run(engine.generate(request(1, CONTEXT - 10, SamplingParameters(1.0, 10)))).tokens) == 10


def test_slots_are_a_multiple_of_16(path):
    with pytest.raises(ValueError, match="slots = 8: must be a multiple of 16"):
        EmbeddedEngine(path("qwen3"), slots=8)


def test_closing_ends_requests_in_flight(path):
    async def run():
        engine = EmbeddedEngine(path("qwen3"))
        tasks = [asyncio.create_task(engine.generate(request(n))) for n in range(3)]
        await until(engine, 2)
        await engine.pause()
        await engine.close()
        assert [(await task).finish_reason for task in tasks] == ["abort"] * 3
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(request(1))

    asyncio.run(run())


async def _turns(count=100):
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_driven_engine_samples_only_when_every_response_is_requested_or_decided(path):
    """Counted in tokens after many turns of the event loop: requests, decisions and their order, not turns."""

    async def run():
        engine = EmbeddedEngine(path("qwen3"), slots=16)
        lengths = {"0": 2, "1": 2, "2": 9, "3": 9}
        requests = [request(int(n), 8, SamplingParameters(1.0, length)) for n, length in lengths.items()]
        with engine.driving(4):
            tasks = [asyncio.create_task(engine.generate(one)) for one in requests[:3]]
            await _turns()
            assert engine._running == [None] * 16, "the fourth response is not requested"
            tasks.append(asyncio.create_task(engine.generate(requests[3])))
            await tasks[1]
            await _turns()
            assert engine._table.counts[2] == 2, "two finished responses are not decided on"
            order = []

            async def decide(number, turns):
                await _turns(turns)
                async with engine.deciding(str(number)):
                    order.append(number)
                    await _turns(turns)

            await decide(0, 0)
            await _turns()
            assert engine._table.counts[2] == 2
            await decide(1, 0)
            await tasks[3]
            await asyncio.gather(decide(3, 0), decide(2, 50))
            assert order == [0, 1, 2, 3], "the order in which they were returned"
            with pytest.raises(RuntimeError, match="more responses than it has announced"):
                await engine.generate(request(7))
        assert len((await engine.generate(request(8))).tokens), "without a driver it waits for nobody"
        await engine.close()

    asyncio.run(run())


def test_closing_does_not_wait_for_a_driver(path):
    async def run():
        engine = EmbeddedEngine(path("qwen3"))
        with engine.driving(2):
            task = asyncio.create_task(engine.generate(request(1)))
            await _turns()
            await engine.close()
            assert (await task).finish_reason == "abort"

    asyncio.run(run())


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = np.array([0.1, 0.0, 0.4, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        log_probs = np.log(probabilities)
    grid = np.append((np.arange(1000) + 0.5) / 1000, [np.nextafter(1.0, 0.0), 0.0])

    def drawn(top_p):
        return draw(np.tile(log_probs, (len(grid), 1)), np.full(len(grid), top_p), grid)

    assert np.bincount(drawn(1.0)[:1000], minlength=5).tolist() == [100, 0, 400, 200, 300]
    np.testing.assert_allclose(np.bincount(drawn(0.65)[:1000], minlength=5), [0, 0, 571, 0, 429], atol=1)
    assert set(drawn(0.1).tolist()) == {2}
    assert drawn(1.0)[-2:].tolist() == [4, 0]


def draw_one(log_probs, top_p, uniform):
    """Draws from one distribution with a loop over tokens, as an independent reference."""
    left, nucleus, total = np.exp(log_probs).tolist(), set(), 0.0
    for token in sorted(range(len(left)), key=lambda token: (-left[token], token)):
        if not nucleus or total < top_p:
            nucleus.add(token)
            total += left[token]
    total = sum(left[token] for token in sorted(nucleus))
    found, cumulative = max(token for token in nucleus if left[token] > 0), 0.0
    for token in sorted(nucleus):
        cumulative += left[token]
        if cumulative > uniform * total:
            return token
    return found


def test_many_draws_equal_single_draws_with_a_loop():
    generator = np.random.default_rng(5)
    logits = np.round(generator.normal(size=(500, 37)) * generator.choice([0.5, 3.0], (500, 1)), 1)  # with ties
    log_probs = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    top_p = generator.choice([1.0, 0.9, 0.5, 0.05], 500)
    uniform = generator.random(500)
    expected_tokens = [draw_one(*one) for one in zip(log_probs, top_p, uniform, strict=True)]
    assert draw(log_probs, top_p, uniform).tolist() == expected_tokens


def test_seeds():
    seeds = {
        sampling_seed(r, p, s, k) for r in range(3) for p in ("1", "11", "1/1") for s in range(12) for k in range(3)
    }
    assert len(seeds) == 3 * 3 * 12 * 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sampling_seed(1, "a", 2, 3) == sampling_seed(1, "a", 2, 3) == 3692764328661748617
