"""The divergences of one rank equal plain float64 loops over the whole vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.compare.divergences import QUANTITIES, Head, Vocabulary, divergences
from tests.actor.allocations import LargestAllocation


def heads(seed, tokens=40, columns=30, width=8, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in (width, width + 4):
        hidden = torch.randn(tokens, size, generator=generator)
        weight = torch.randn(columns, size, generator=generator) * spread / size**0.5
        found.append(Head(sixteenths(weight).to(dtype), sixteenths(hidden).to(dtype)))
    return (*found, torch.randint(columns - 2, (tokens,), generator=generator))


def sixteenths(values):
    """Rounds to multiples of 1/16, whose products and sums are exact in float32: every matrix product is the same."""
    return (values * 16).round() / 16


def by_loop(base, rl, labels, size, temperature=1.0, top_k=10):
    """Computes every quantity token by token from the definitions, in Python's float64."""
    rows = []
    for position, label in enumerate(labels.tolist()):
        logits = [(head.hidden[position] @ head.weight[:size].t()).float() / temperature for head in (base, rl)]
        q, p = ([v - _log_sum_exp(each.tolist()) for v in each.tolist()] for each in logits)
        js = kl = reverse = h_base = h_rl = 0.0
        for a, b in zip(p, q, strict=True):
            m = math.log((math.exp(a) + math.exp(b)) / 2)
            js += 0.5 * (math.exp(a) * (a - m) + math.exp(b) * (b - m))
            kl += math.exp(a) * (a - b)
            reverse += math.exp(b) * (b - a)
            h_rl -= math.exp(a) * a
            h_base -= math.exp(b) * b
        order = [sorted(range(size), key=lambda i, each=each: (-float(each[i]), i)) for each in logits]
        k = min(top_k, size)
        overlap = len(set(order[0][:k]) & set(order[1][:k])) / k
        rank = order[0].index(order[1][0]) + 1
        log_probs = [q[label], p[label], p[label] - q[label]]
        rows.append([*log_probs, js, kl, reverse, h_base, h_rl, rank, overlap, order[0][0], order[1][0]])
    return torch.tensor(rows, dtype=torch.float64).t()


def _log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


@given(st.integers(0, 1000), st.sampled_from([1, 7, 64]), st.sampled_from([0.5, 1.0]), st.sampled_from([1, 5, 99]))
def test_equals_a_loop(seed, chunk_tokens, temperature, top_k):
    base, rl, labels = heads(seed, tokens=9, columns=12)
    options = {"temperature": temperature, "top_k": top_k}
    found = divergences(base, rl, labels, Vocabulary(10), chunk_tokens=chunk_tokens, **options)
    wanted = by_loop(base, rl, labels, 10, **options)
    assert (found - wanted).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_differ_by_exactly_nothing(dtype):
    base, _, labels = heads(1, dtype=dtype, spread=8.0)
    found = dict(zip(QUANTITIES, divergences(base, base, labels, Vocabulary(30), chunk_tokens=16), strict=True))
    for name in ("delta", "js", "kl", "kl_reverse"):
        assert not found[name].any(), name
    assert torch.equal(found["entropy_base"], found["entropy_rl"])
    assert found["rank"].eq(1).all()
    assert found["overlap"].eq(1).all()


def test_distributions_without_a_common_token_have_js_ln_2():
    weight = torch.eye(3) * 2000
    hidden = torch.eye(3)
    labels = torch.tensor([0, 1, 2])
    found = divergences(Head(weight, hidden), Head(weight, hidden.roll(1, 0)), labels, Vocabulary(3))
    named = dict(zip(QUANTITIES, found, strict=True))
    assert named["js"].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)
    assert (named["js"] <= math.log(2)).all()
    assert named["kl"].tolist() == pytest.approx([2000.0] * 3)
    assert found.isfinite().all()


def test_close_models_keep_their_digits():
    """A shift of 1e-5 in one logit gives a KL of about 5e-11 p (1 − p), which float32 sums would lose."""
    hidden = torch.ones(1, 1)
    base = torch.tensor([[0.5], [0.25], [0.125]])
    rl = base.clone()
    rl[0] += 2**-16
    found = divergences(Head(base, hidden), Head(rl, hidden), torch.tensor([0]), Vocabulary(3))
    wanted = by_loop_in_fractions(base[:, 0].tolist(), rl[:, 0].tolist())
    named = dict(zip(QUANTITIES, found[:, 0].tolist(), strict=True))
    assert named["kl"] == pytest.approx(wanted[0], rel=1e-5)
    assert named["js"] == pytest.approx(wanted[1], rel=1e-4)


def by_loop_in_fractions(base, rl):
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    exps = [[Decimal(v).exp() for v in each] for each in (base, rl)]
    q, p = ([v / sum(each) for v in each] for each in exps)
    kl = sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
    js = sum((a * (2 * a / (a + b)).ln() + b * (2 * b / (a + b)).ln()) / 2 for a, b in zip(p, q, strict=True))
    return float(kl), float(js)


def test_no_tensor_has_tokens_times_vocabulary():
    base, rl, labels = heads(2, tokens=400, columns=300)
    with LargestAllocation() as seen:
        divergences(base, rl, labels, Vocabulary(300), chunk_tokens=16)
    assert seen.elements <= max(16 * 300, 16 * 10 * 10, 400 * len(QUANTITIES)), seen.operator
    with LargestAllocation() as seen:
        divergences(base, rl, labels, Vocabulary(300), chunk_tokens=400)
    assert seen.elements >= 400 * 300, "the hook must see a whole table"
