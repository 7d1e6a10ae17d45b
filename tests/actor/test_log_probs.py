"""Log-probs in chunks compared with all logits at once, on one rank; several ranks are in tests/distributed."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.actor.log_probs import (
    _Head,
    _local_statistics,
    _merge,
    token_log_probs,
)
from tests.actor.allocations import LargestAllocation
from tests.actor.plain_log_probs import plain_log_probs, random_problem, relative_error, with_gradients

seeds = st.integers(0, 2**31)
chunks = st.one_of(st.just(1), st.integers(2, 40), st.sampled_from([299, 300, 301, 1024]))
temperatures = st.one_of(st.just(1.0), st.floats(0.3, 2.0))
BOTH, LOG_PROBS, ENTROPY = (True, True), (True, False), (False, True)


def assert_equal_to_plain(problem, options, bound, use=BOTH):
    """Compares values and gradients with the plain path in float64."""
    chunked = partial(token_log_probs, with_entropy=True, **options)
    kept = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
    got = with_gradients(chunked, *problem, use=use)
    hidden, weight, labels = problem
    want = with_gradients(partial(plain_log_probs, **kept), hidden.double(), weight.double(), labels, use=use)
    for name in want:
        assert relative_error(got[name], want[name]) <= bound, name


@given(
    tokens=st.integers(1, 300),
    columns=st.integers(1, 150),
    width=st.integers(1, 24),
    padding=st.integers(0, 20),
    chunk_tokens=chunks,
    temperature=temperatures,
    use=st.sampled_from([BOTH, LOG_PROBS, ENTROPY]),
    seed=seeds,
)
def test_equals_autograd_through_log_softmax(tokens, columns, width, padding, chunk_tokens, temperature, use, seed):
    problem = random_problem(seed, tokens, columns + padding, width, vocab_size=columns)
    options = {"temperature": temperature, "vocab_size": columns, "chunk_tokens": chunk_tokens}
    assert_equal_to_plain(problem, options, 1e-12, use)
    in_float32 = (problem[0].float(), problem[1].float(), problem[2])
    assert_equal_to_plain(in_float32, options, 1e-5, use)


@pytest.mark.parametrize("chunk_tokens", [7, 64, 1024])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_bfloat16_rounds_logits_and_products_and_nothing_else(chunk_tokens, temperature):
    """The error against float64 is the logits' 8 bits; against bfloat16 logits with a float32 softmax it is none."""
    hidden, weight, labels = random_problem(3, 200, 500, 32, dtype=torch.bfloat16)
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens}
    assert_equal_to_plain((hidden, weight, labels), options, 2e-2)
    got = token_log_probs(hidden, weight, labels, with_entropy=True, **options)
    want = plain_log_probs(hidden, weight, labels, temperature)
    assert got.log_probs.dtype == got.entropy.dtype == torch.float32
    assert relative_error(got.log_probs, want.log_probs) <= 1e-6
    assert relative_error(got.entropy, want.entropy) <= 1e-6


def test_bfloat16_weight_gradient_accumulates_in_float32():
    """128 chunks lose no more precision than one; with sums in bfloat16 they would."""
    problem = random_problem(5, 1024, 64, 16, dtype=torch.bfloat16)
    hidden, weight, labels = problem
    want = with_gradients(plain_log_probs, hidden.double(), weight.double(), labels)["grad_weight"]

    def error(gradient):
        return relative_error(gradient, want)

    def gradient(rows, chunk_tokens):
        weight_leaf = weight.clone().requires_grad_()
        upstream = torch.randn(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[rows]
        result = token_log_probs(hidden[rows], weight_leaf, labels[rows], chunk_tokens=chunk_tokens, with_entropy=True)
        upstream_entropy = torch.randn(2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[1024:]
        ((result.log_probs * upstream).sum() + (result.entropy * upstream_entropy[rows]).sum()).backward()
        return weight_leaf.grad

    one, many = gradient(slice(None), 1024), gradient(slice(None), 8)
    summed = sum(gradient(slice(start, start + 8), 8) for start in range(0, 1024, 8))
    assert summed.dtype == torch.bfloat16
    assert error(many) <= 1.5 * error(one)
    assert error(summed) > 2 * error(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_extreme_logits(dtype, label):
    """Logits of ±10⁴ are exact: log π of the largest is 0, the others are differences of logits."""
    logits = torch.tensor([1e4, -1e4, 9984.0], dtype=dtype)  # exact in float32; what bfloat16 makes of them below
    hidden, weight = torch.ones(1, 1, dtype=dtype), logits[:, None]
    got = with_gradients(partial(token_log_probs, with_entropy=True), hidden, weight, torch.tensor([label]))
    want = with_gradients(plain_log_probs, hidden.double(), weight.double(), torch.tensor([label]))
    for name, value in got.items():
        assert value.isfinite().all(), name
    assert got["log_probs"].item() == pytest.approx(want["log_probs"].item(), rel=1e-6, abs=2e-7)
    assert got["entropy"].item() == pytest.approx(want["entropy"].item(), abs=1e-5)


def test_cancellation_at_large_logits():
    """A distribution with a common offset of 10⁴ keeps the accuracy that float32 logits allow."""
    hidden, weight, labels = random_problem(1, 50, 40, 8)
    offset = torch.full((40, 1), 8192.0, dtype=torch.float64)
    hidden, weight = torch.cat([hidden, torch.ones(50, 1)], 1), torch.cat([weight, offset], 1)
    logits = (hidden.float() @ weight.float().t()).double()
    got = with_gradients(partial(token_log_probs, with_entropy=True), hidden.float(), weight.float(), labels)
    want = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    assert relative_error(got["log_probs"], want) <= 1e-6


def test_hard_distribution_everywhere():
    problem = random_problem(2, 64, 100, 16, spread=3e3)
    assert_equal_to_plain(problem, {"chunk_tokens": 10}, 1e-12)
    got = with_gradients(
        partial(token_log_probs, with_entropy=True), problem[0].float(), problem[1].float(), problem[2]
    )
    assert all(value.isfinite().all() for value in got.values())


@given(
    size=st.integers(1, 6),
    columns=st.integers(1, 20),
    padding=st.floats(0, 0.95),
    spread=st.sampled_from([1.0, 100.0]),
    seed=seeds,
)
def test_statistics_of_any_number_of_ranks_merge(size, columns, padding, spread, seed):
    """Includes ranks that have only padding."""
    vocab_size = max(1, round(size * columns * (1 - padding)))
    hidden, weight, labels = random_problem(seed, 30, size * columns, 8, vocab_size=vocab_size, spread=spread)
    parts = []
    for rank in range(size):
        real = min(max(vocab_size - rank * columns, 0), columns)
        head = _Head(rank * columns, real, 0.7, 11, None)
        shard = weight[rank * columns : (rank + 1) * columns]
        parts.append(_local_statistics(hidden, shard, labels, head, with_entropy=True))
    _, _, log_probs, entropy = _merge(torch.stack(parts))
    want = plain_log_probs(hidden, weight, labels, 0.7, vocab_size)
    assert relative_error(log_probs, want.log_probs) <= 1e-12
    assert relative_error(entropy, want.entropy) <= 1e-12
    assert (log_probs <= 0).all()
    assert (entropy >= 0).all()


def test_padding_columns_have_no_probability_and_no_gradient():
    hidden, weight, labels = random_problem(4, 20, 12, 5, vocab_size=10)
    weight[10:] = 1e3 * hidden.sum(0)  # would dominate every softmax
    got = with_gradients(partial(token_log_probs, vocab_size=10, with_entropy=True), hidden, weight, labels)
    want = with_gradients(plain_log_probs, hidden, weight[:10], labels)
    assert relative_error(got["log_probs"], want["log_probs"]) <= 1e-12
    assert torch.equal(got["grad_weight"][10:], torch.zeros(2, 5, dtype=torch.float64))
    assert token_log_probs(hidden[:1], weight, torch.tensor([10]), vocab_size=10).log_probs.item() == -math.inf


def test_any_leading_shape_and_strides():
    hidden, weight, labels = random_problem(6, 24, 17, 8)
    want = with_gradients(partial(token_log_probs, with_entropy=True), hidden, weight, labels)

    def transposed(hidden, weight, labels):
        swapped = hidden.view(4, 6, 8).transpose(0, 1)
        result = token_log_probs(swapped, weight.t().contiguous().t(), labels.view(4, 6).t(), chunk_tokens=5)
        assert result.log_probs.shape == (6, 4)
        assert result.entropy is None
        return type(result)(result.log_probs.t().reshape(-1), torch.zeros(24))

    got = with_gradients(transposed, hidden, weight, labels, use=LOG_PROBS)
    reference = with_gradients(partial(token_log_probs, with_entropy=True), hidden, weight, labels, use=LOG_PROBS)
    assert relative_error(got["log_probs"], want["log_probs"]) <= 1e-12
    assert relative_error(got["grad_hidden"], reference["grad_hidden"]) <= 1e-12
    assert relative_error(got["grad_weight"], reference["grad_weight"]) <= 1e-12


def test_no_tokens():
    problem = random_problem(0, 0, 7, 3)
    got = with_gradients(partial(token_log_probs, with_entropy=True), *problem)
    assert got["log_probs"].shape == got["entropy"].shape == (0,)
    assert torch.equal(got["grad_weight"], torch.zeros(7, 3, dtype=torch.float64))


def test_log_probs_do_not_depend_on_what_else_is_asked():
    """The pass for π_old and the training pass must agree bitwise at equal weights."""
    hidden, weight, labels = random_problem(8, 100, 300, 16, dtype=torch.float32)
    options = {"temperature": 0.7, "chunk_tokens": 33}
    recorded = with_gradients(partial(token_log_probs, with_entropy=True, **options), hidden, weight, labels)
    with torch.no_grad():
        plain = token_log_probs(hidden, weight, labels, **options)
    assert torch.equal(recorded["log_probs"], plain.log_probs)
    assert not plain.log_probs.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_input_alone(frozen):
    hidden, weight, labels = random_problem(9, 40, 30, 8)
    want = with_gradients(plain_log_probs, hidden, weight, labels, use=LOG_PROBS)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = (weight if frozen == "hidden" else hidden).requires_grad_()
    (token_log_probs(hidden, weight, labels, chunk_tokens=9).log_probs * upstream).sum().backward()
    assert relative_error(leaf.grad, want["grad_weight" if frozen == "hidden" else "grad_hidden"]) <= 1e-12


TOKENS, COLUMNS, WIDTH, CHUNK = 256, 96, 8, 16


def recorded(compute, dtype, use):
    with LargestAllocation() as seen:
        with_gradients(compute, *random_problem(0, TOKENS, COLUMNS, WIDTH, dtype=dtype), use=use)
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", [BOTH, LOG_PROBS])
def test_never_holds_logits_beyond_a_chunk(dtype, use):
    assert CHUNK * COLUMNS < TOKENS * WIDTH < TOKENS * COLUMNS
    seen = recorded(partial(token_log_probs, chunk_tokens=CHUNK, with_entropy=True), dtype, use)
    assert seen.elements <= TOKENS * WIDTH, seen.operator
    assert seen.calls["aten.mm.default"] >= TOKENS // CHUNK, "the recorder must have seen forward and backward"
    assert recorded(plain_log_probs, dtype, use).elements >= TOKENS * COLUMNS, "the plain path must trip the check"


def test_entropy_costs_nothing_in_backward_without_a_gradient():
    compute = partial(token_log_probs, chunk_tokens=CHUNK, with_entropy=True)
    without, both = (recorded(compute, torch.float64, use).calls["aten.exp.default"] for use in (LOG_PROBS, BOTH))
    assert both == without + TOKENS // CHUNK


def test_keeps_inputs_and_four_numbers_per_token_for_backward():
    hidden, weight, labels = random_problem(0, TOKENS, COLUMNS, WIDTH)

    def kept(compute):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
            compute(hidden.requires_grad_(), weight.requires_grad_(), labels)
        return sum(tensor.numel() for tensor in saved.values())

    inputs = hidden.numel() + weight.numel()
    assert kept(partial(token_log_probs, chunk_tokens=CHUNK, with_entropy=True)) == inputs + 4 * TOKENS
    assert kept(plain_log_probs) > inputs + TOKENS * COLUMNS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"vocab_size": 8}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_bad_arguments(change, message):
    hidden, weight, labels = random_problem(0, 4, 7, 3)
    with pytest.raises(ValueError, match=message):
        token_log_probs(**({"hidden": hidden, "weight": weight, "labels": labels} | change))
