"""Times of sampling against closed forms."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.observe.devices import device
from fipo_megatron.plan.efficiencies import TABLE, Rates
from fipo_megatron.plan.generation_time import (
    Sampling,
    Server,
    full_length_responses,
    generate,
    kv_bytes,
    run_batch,
)
from fipo_megatron.plan.response_lengths import ResponseLengths
from fipo_megatron.weights.architecture import Architecture

CONFIGS = Path(__file__).parents[1] / "weights" / "configs"
FLAT = Server(
    weights=0, experts=0, expert_share=0, product=0, context=0, exchange=0, overhead=0.01, prefill=0
)  # a step takes 10 ms whatever runs
SAME = ResponseLengths(median=1000, spread=0, limit=1000, prompt=100)
SPREAD = ResponseLengths.from_mean(2000, 8000, prompt=100)


def architecture(name):
    return Architecture.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))


def server(name="Qwen2.5-32B", gpu="h100", tensor=4):
    return Server.build(architecture(name), device(gpu), tensor, Rates())


def test_equal_responses_run_in_waves():
    """32 responses of 1,000 tokens, 16 at a time on each of two servers, or 8 at a time."""
    for slots, waves in ((16, 1), (8, 2)):
        batch = run_batch(FLAT, SAME, groups=8, size=4, servers=2, slots=slots)
        assert batch.group_seconds[-1] == pytest.approx(waves * 1000 * 0.01)
        assert batch.until(8) == pytest.approx((waves * 10, 32_000))
        assert batch.peak == slots


def test_the_time_of_a_token():
    """Each term by hand: 1,000 steps with 4 requests whose context grows from 100 to 1,100 tokens."""
    terms = replace(FLAT, overhead=0, context=1e-6, product=1e-3, weights=3e-3, exchange=1e-4, prefill=1e-5)
    batch = run_batch(terms, SAME, groups=1, size=4, servers=1, slots=4)
    context = 4 * (100 + 1000 / 2)
    step = max(3e-3, 4 * 1e-3) + context * 1e-6 + 4 * 1e-4
    assert batch.group_seconds[-1] == pytest.approx(100 * 1e-5 + 1000 * step)
    twice = run_batch(terms, SAME, groups=2, size=4, servers=1, slots=4)  # the second wave starts with no context
    assert twice.group_seconds[-1] == pytest.approx(2 * batch.group_seconds[-1])
    small = replace(terms, product=1e-5)
    assert small.step(4, 0) == pytest.approx(3e-3 + 4e-4)  # bound by reading the weights


def test_experts_are_read_as_they_are_chosen():
    mixture = Server.build(architecture("Qwen3-30B-A3B"), device("h100"), 1, Rates())
    assert mixture.expert_share == 8 / 128
    one, many = mixture.step(1, 0), mixture.step(200, 0)
    assert one - mixture.overhead == pytest.approx(mixture.weights + mixture.experts / 16)
    assert many - mixture.overhead == pytest.approx(mixture.weights + mixture.experts, rel=1e-3)


def test_the_longest_response_ends_the_batch():
    """With room for all, a batch takes as many steps as its longest response has tokens."""
    longest = SPREAD.sample_groups(16, 8).max()
    batch = run_batch(FLAT, SPREAD, groups=16, size=8, servers=4, slots=1000)
    assert batch.group_seconds[-1] == pytest.approx(longest * 0.01)
    assert batch.until(16)[1] == SPREAD.sample_groups(16, 8).sum()
    half = batch.until(8)
    assert half[0] < 0.8 * batch.group_seconds[-1]


def test_responses_that_fit():
    """Qwen2.5-32B has 64 layers with 8 KV heads of 128: 262,144 bytes per token, a quarter on each of 4 GPUs."""
    shape = architecture("Qwen2.5-32B")
    assert kv_bytes(shape, 1) == 262_144
    assert kv_bytes(shape, 4) == 65_536
    assert kv_bytes(shape, 16) == kv_bytes(shape, 8) == 32_768  # a head is not split
    weights = 32_763_876_352 * 2 / 4
    free = 70 * 2**30 - weights
    assert full_length_responses(shape, 4, 70, 22_528) == int(free / (65_536 * 22_528))
    assert full_length_responses(shape, 1, 60, 22_528) == 0


def test_rounds_of_dynamic_sampling():
    """Half the groups are kept: 64, 32, …, 1 prompts, each round as long as a response."""
    sampling = Sampling(servers=4, slots=100, groups=64, size=4, kept_fraction=0.5)
    found = generate(FLAT, SAME, sampling)
    assert found.rounds == pytest.approx([10.0] * 7)
    assert found.tokens == pytest.approx(sum((64, 32, 16, 8, 4, 2, 1)) * 4 * 1000)
    assert found.kept_groups == pytest.approx(63.5)
    few = generate(FLAT, SAME, replace(sampling, max_rounds=2))
    assert len(few.rounds) == 2
    assert few.kept_groups == 48


def test_over_sampling_ends_in_one_round():
    sampling = Sampling(servers=4, slots=1000, groups=64, size=4, kept_fraction=0.5)
    alone = generate(FLAT, SPREAD, sampling)
    over = generate(FLAT, SPREAD, replace(sampling, over_sampling=3))
    assert len(over.rounds) == 1
    assert over.seconds < alone.rounds[0]  # the slowest third is not waited for
    carried = generate(FLAT, SPREAD, replace(sampling, over_sampling=3, carries=True))
    assert carried.seconds < over.seconds
    assert carried.tokens == pytest.approx(128 * 4 * SPREAD.mean)


def test_more_servers_are_faster_and_longer_responses_slower():
    real = server()
    base = Sampling(servers=8, slots=64, groups=256, size=16)
    times = [generate(real, SPREAD, replace(base, servers=count)).seconds for count in (2, 4, 8, 16, 32)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[1] == pytest.approx(2, rel=0.15)  # bound by throughput
    means = [
        generate(real, ResponseLengths.from_mean(mean, 20_480), base).seconds for mean in (1000, 4000, 8000, 12_000)
    ]
    assert means == sorted(means)
    slots = [generate(real, SPREAD, replace(base, slots=count)).seconds for count in (8, 32, 128)]
    assert slots == sorted(slots, reverse=True)


def test_published_decoding():
    """The figures that the table takes its efficiencies from are reproduced."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29_568,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
    }
    server_72b = Server.build(Architecture.from_hf(config), device("h100"), 2, Rates())
    assert server_72b.step(1, 200) == pytest.approx(30.9e-3, rel=0.05)
    config |= {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "head_dim": 128,
        "intermediate_size": 17_408,
        "vocab_size": 151_936,
    }
    shape = Architecture.from_hf(config)
    server_14b = Server.build(shape, device("h100"), 1, Rates())
    memory = device("h100").memory_gib - TABLE["engine_reserve"].value
    running = full_length_responses(shape, 1, memory, 400)  # ShareGPT: 217 tokens in, 201 out
    rate = running / server_14b.step(running, running * 320)
    assert rate == pytest.approx(12_059, rel=0.15)
