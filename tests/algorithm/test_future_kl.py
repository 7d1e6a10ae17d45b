"""Compares the scan with a float64 loop, and with itself under other layouts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.algorithm.future_kl import (
    SequenceShards,
    chunk_carries,
    discount,
    future_kl,
    scan_chunks,
    suffix_scan,
)
from fipo_megatron.data.context_parallel import CpLayout
from tests.algorithm.reference import suffix_sum
from tests.data.parts import unslice

half_lives = st.one_of(st.floats(1, 4096), st.just(math.inf))
seeds = st.integers(0, 2**32 - 1)


def random_values(seed, length, dtype=torch.float32):
    """Returns shifts of either sign with about a fifth of the positions masked."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.01, 0.3, length) * (rng.random(length) < 0.8)
    return torch.from_numpy(values).to(dtype)


def loop(values, half_life):
    return torch.from_numpy(suffix_sum(values.double().numpy(), half_life))


def assert_close(got, want, bound=1e-5):
    assert (got.double() - want).abs().max() <= bound * max(float(want.abs().max()), 1e-12)


def in_simulated_ranks(values, lengths, half_life, size):
    """Returns F of packed ``values`` of these padded lengths, assembled from every rank's part, and the carries."""
    cu_seqlens = np.cumsum([0, *lengths])
    layouts = [CpLayout(size, rank) for rank in range(size)]
    shards = [SequenceShards.build(each.chunk_lengths(cu_seqlens), each.owners, each.rank) for each in layouts]
    parts = [values[torch.from_numpy(each.indices(cu_seqlens))] for each in layouts]
    heads = torch.stack([scan_chunks(part, shard, half_life)[1] for part, shard in zip(parts, shards, strict=True)])
    results = [future_kl(p, half_life, s, lambda _: heads).numpy() for p, s in zip(parts, shards, strict=True)]
    carries = torch.stack([chunk_carries(heads, shard, half_life) for shard in shards])
    return torch.from_numpy(unslice(results, cu_seqlens)), carries


@given(length=st.integers(1, 5000), half_life=half_lives, seed=seeds)
def test_dense_equals_the_loop(length, half_life, seed):
    values = random_values(seed, length)
    before = values.clone()
    assert_close(future_kl(values, half_life), loop(values, half_life))
    assert torch.equal(values, before), "the input must not be written to"


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=12), half_life=half_lives, seed=seeds)
def test_packed_equals_each_sequence_alone(lengths, half_life, seed):
    values = random_values(seed, sum(lengths))
    got = future_kl(values, half_life, SequenceShards.build(lengths))
    for part, alone in zip(got.split(lengths), values.split(lengths), strict=True):
        assert_close(part, loop(alone, half_life))


def test_any_context_parallel_size_equals_the_loop():
    crossed = {2: 0, 4: 0, 8: 0}

    @given(
        size=st.sampled_from([1, 2, 4, 8]),
        lengths=st.lists(st.integers(1, 600), min_size=1, max_size=6),
        half_life=half_lives,
        seed=seeds,
    )
    def check(size, lengths, half_life, seed):
        carries = compare_layout(size, lengths, half_life, seed)
        if size > 1 and (carries.abs() > 0.05).any(dim=0).any(dim=0).all():
            crossed[size] += 1

    check()
    assert min(crossed.values()) >= 5, f"cases in which more than 0.05 crossed into both slots of a rank: {crossed}"


def compare_layout(size, lengths, half_life, seed):
    padded = [CpLayout(size).padded_length(length) for length in lengths]
    values = random_values(seed, sum(padded))
    for start, length, whole in zip(np.cumsum([0, *padded]), lengths, padded, strict=False):
        values[start + length : start + whole] = 0.0  # padding; short sequences leave whole ranks without a token
    got, carries = in_simulated_ranks(values, padded, half_life, size)
    for part, alone in zip(got.split(padded), values.split(padded), strict=True):
        assert_close(part, loop(alone, half_life))
    return carries


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("half_life", [32.0, 256.0, math.inf])
def test_carries_matter_and_are_exact(size, half_life):
    """The layouts agree to rounding in float64, and no carry across a chunk boundary is negligible."""
    values = random_values(7, 2 * 1280, torch.float64) + 0.1  # a drift in one direction, so that no carry is near 0
    got, carries = in_simulated_ranks(values, [1280, 1280], half_life, size)
    want = torch.cat([loop(part, half_life) for part in values.split(1280)])
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    inner = carries[carries != 0]
    assert len(inner) == 2 * (2 * size - 1)
    assert inner.abs().min() > 0.05


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("end", range(64))
def test_response_that_ends_in_any_chunk(end, size):
    values = torch.zeros(64, dtype=torch.float64)
    values[max(0, end - 5) : end + 1] = 0.7
    got, _ = in_simulated_ranks(values, [64], 8.0, size)
    assert_close(got, loop(values, 8.0), 1e-12)


def test_masked_positions_count_as_distance():
    assert future_kl(torch.tensor([0.0, 0.0, 1.0]), half_life=1.0).tolist() == [0.25, 0.5, 1.0]


def test_infinite_half_life_is_a_plain_suffix_sum():
    assert future_kl(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), math.inf).tolist() == [[6, 5, 3], [15, 11, 6]]
    assert discount(math.inf) == 1.0


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_accumulates_in_at_least_float32(given_dtype, expected):
    values = torch.full((4096,), 1e-3, dtype=given_dtype)
    result = future_kl(values, math.inf)
    assert result.dtype == expected
    assert float(result[0]) == pytest.approx(4096 * float(values[0]), rel=1e-5)


def test_keeps_nothing_for_backward():
    values = torch.randn(1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert not future_kl(values, 32.0).requires_grad
    assert kept == []


@pytest.mark.parametrize("size", [0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 33_000])
def test_scan_sizes_around_a_block(size):
    values = torch.randn(size, dtype=torch.float64)
    ends = [t for t in range(size) if t % 77 == 5 or t == size - 1]
    want, following = [0.0] * size, 0.0
    for t in range(size - 1, -1, -1):
        following = values[t].item() + (0.0 if t % 77 == 5 else 0.97 * following)
        want[t] = following
    assert suffix_scan(values, 0.97, torch.tensor(ends, dtype=torch.int64)).tolist() == pytest.approx(want)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match=r"half_life must be > 0 tokens.*got 0"):
        future_kl(torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="layout has 4 tokens on this rank, got 3"):
        future_kl(torch.ones(3), 1.0, SequenceShards.build([4]))
    with pytest.raises(ValueError, match=r"at least one token per chunk, got \[3, 0\]"):
        SequenceShards.build([3, 0])
    with pytest.raises(ValueError, match="every rank must hold each of its slots once"):
        SequenceShards.build([3], owners=((0, 0), (0, 0)))
    two_ranks = SequenceShards.build([2], owners=CpLayout(2).owners)
    with pytest.raises(ValueError, match="spread over 2 ranks; pass gather_over"):
        future_kl(torch.ones(4), 1.0, two_ranks)
    with pytest.raises(ValueError, match="expected 2 ranks"):
        future_kl(torch.ones(4), 1.0, two_ranks, lambda heads: heads[None])
