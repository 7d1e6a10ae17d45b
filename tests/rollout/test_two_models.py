"""Draws from two models: bit for bit one model's own at the ends, and the closed form of each rule in between."""

import asyncio

import numpy as np
import pytest
import torch

from fipo_megatron.rollout.embedded.drawing import Amplify, Draw, PrimaryAlone, Swap, draw_from_one
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from tests.compare import delta_swap
from tests.rollout.test_embedded import all_of, identical, models, request

SELECTORS = ("delta", "js", "kl", "kl_reverse", "entropy", "random")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    paths = []
    for seed in (0, 7):
        paths.append(tmp_path_factory.mktemp("model"))
        models("qwen3", seed).save_pretrained(paths[-1])
    return paths


def sampled(path, second=None, requests=None):
    requests = requests or [request(n) for n in range(20)]
    return asyncio.run(all_of(EmbeddedEngine(path, slots=16, second=second), requests))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_rule_that_never_selects_gives_the_primary_models_responses(pair, selector):
    never = -np.inf if selector == "delta" else np.inf
    found = sampled(pair[0], (pair[1], Swap(selector, never)))
    identical(found, sampled(pair[0]))
    assert not any(one.selected.any() or one.changed.any() for one in found)


@pytest.mark.parametrize("selector", SELECTORS[1:])
def test_a_rule_that_always_selects_gives_the_second_models_responses(pair, selector):
    found = sampled(pair[0], (pair[1], Swap(selector, -np.inf)))
    identical(found, sampled(pair[1]))
    assert all(one.selected.all() for one in found)
    assert 0.5 < np.concatenate([one.changed for one in found]).mean() < 1


def test_the_primary_model_alone_gives_its_responses_and_the_quantities_of_all_selectors(pair):
    plain, found = sampled(pair[0]), sampled(pair[0], (pair[1], PrimaryAlone(SELECTORS)))
    identical(found, plain)
    assert all(one.quantities is None for one in plain)
    for number, selector in enumerate(SELECTORS):
        never = -np.inf if selector == "delta" else np.inf
        alone = sampled(pair[0], (pair[1], Swap(selector, never)))
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_array_equal(one.quantities[:, number], other.quantities[:, 0])


@pytest.mark.parametrize("primary_is_rl", [True, False])
def test_gamma_0_gives_the_responses_of_rl(pair, primary_is_rl):
    base, rl = pair
    primary, second = (rl, base) if primary_is_rl else (base, rl)
    identical(sampled(primary, (second, Amplify(0.0, None, primary_is_rl))), sampled(rl))


def test_identical_models_are_never_swapped_below_0(pair):
    for selector, threshold in (("delta", 0.0), ("js", 0.0), ("kl", 0.0), ("kl_reverse", 0.0)):
        found = sampled(pair[0], (pair[0], Swap(selector, threshold)))
        assert not any(one.selected.any() for one in found)


def draws(rule, logits, temperature=1.0, top_p=1.0, count=200_000):
    """Returns the frequencies of tokens, and the share of selected ones, in many draws from two distributions."""
    uniform = np.random.default_rng(3).random((2, count))
    how = Draw(torch.full((count, 1), temperature, dtype=torch.float64), np.full(count, top_p), uniform)
    rows = [torch.from_numpy(np.tile(each, (count, 1))) for each in logits]
    drawn = rule(*rows, how) if not isinstance(rule, type(draw_from_one)) else rule(rows[0], how)
    frequencies = np.bincount(drawn.tokens, minlength=len(logits[0])) / count
    return frequencies, drawn


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


LOGITS = np.random.default_rng(1).normal(size=(2, 11)) * 1.5


def close(frequencies, probabilities, count=200_000):
    sigma = np.sqrt(probabilities * (1 - probabilities) / count)
    np.testing.assert_array_less(np.abs(frequencies - probabilities), 5 * sigma + 1e-9)


@pytest.mark.parametrize("threshold", [-2.0, -0.5, 0.0, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_marginal_of_a_delta_swap_is_the_closed_form(threshold, temperature):
    primary, second = softmax(LOGITS[0] / temperature), softmax(LOGITS[1] / temperature)
    stays = np.log(second) - np.log(primary) >= threshold
    frequencies, drawn = draws(Swap("delta", threshold), LOGITS, temperature)
    close(frequencies, primary * stays + primary[~stays].sum() * second)
    close(drawn.selected.mean()[None], primary[~stays].sum()[None])


def test_responses_with_delta_swaps_have_the_closed_form(tmp_path):
    """The same check as with servers, in ``tests/sglang/test_swap.py``."""
    paths = [tmp_path / str(seed) for seed in delta_swap.SEEDS]
    for path, seed in zip(paths, delta_swap.SEEDS, strict=True):
        delta_swap.models.model(seed=seed).save_pretrained(path)
    second = paths[1], Swap("delta", delta_swap.THRESHOLD)
    found = asyncio.run(all_of(EmbeddedEngine(paths[0], slots=64, second=second), delta_swap.requests(3000)))
    delta_swap.check_distribution(found)
    requests = delta_swap.requests(100, max_tokens=40)
    found = asyncio.run(all_of(EmbeddedEngine(paths[0], slots=64, second=second), requests))
    delta_swap.check_selected(found, requests)


@pytest.mark.parametrize("selector", SELECTORS[1:])
def test_selectors_are_above_their_threshold_exactly_as_computed_by_hand(selector):
    primary, second = softmax(LOGITS[0]), softmax(LOGITS[1])
    mean = (primary + second) / 2
    value = {
        "js": (primary @ np.log(primary / mean) + second @ np.log(second / mean)) / 2,
        "kl": second @ np.log(second / primary),
        "kl_reverse": primary @ np.log(primary / second),
        "entropy": -primary @ np.log(primary),
        "random": 0.5,
    }[selector]
    few, many = (draws(Swap(selector, value + shift), LOGITS)[1].selected.mean() for shift in (1e-9, -1e-9))
    assert (few, many) == (0, 1) if selector != "random" else few == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("gamma", "threshold"), [(0.5, None), (0.5, -0.3), (2.0, 0.4)])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_amplified_draws_have_the_mixed_distribution_with_temperature_and_nucleus_after_mixing(gamma, threshold, top_p):
    temperature = 0.8
    rl, base = (softmax(each / temperature) for each in LOGITS)
    log_rl, log_base = (np.log(softmax(each)) for each in LOGITS)
    mixed = nucleus(softmax(((1 + gamma) * log_rl - gamma * log_base) / temperature), top_p)
    frequencies, drawn = draws(Amplify(gamma, threshold), LOGITS, temperature, top_p)
    if threshold is None:
        close(frequencies, mixed)
        return
    stays, own = np.log(rl / base) >= threshold, nucleus(rl, top_p)
    close(frequencies, own * stays + own[~stays].sum() * mixed)
    close(drawn.selected.mean()[None], own[~stays].sum()[None])


def nucleus(probabilities, top_p):
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
    found = np.zeros_like(probabilities)
    found[kept] = probabilities[kept] / probabilities[kept].sum()
    return found


def test_log_probs_are_those_of_the_distribution_that_a_token_was_drawn_from():
    primary, second = (np.log(softmax(each)) for each in LOGITS)
    _, drawn = draws(Swap("delta", 0.0), LOGITS, count=1000)
    wanted = np.where(drawn.selected, second[drawn.tokens], primary[drawn.tokens])
    np.testing.assert_allclose(drawn.log_probs, wanted, atol=1e-12)
    assert (drawn.changed <= drawn.selected).all()
    assert drawn.changed.any()


def entropy(probabilities):
    return -np.sum(probabilities * np.log(np.where(probabilities > 0, probabilities, 1)))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("threshold", [None, -0.3])
def test_entropies_are_those_of_the_distribution_that_tokens_have(threshold, top_p):
    factors, temperature = (0.5, 1.0, 1.7), 0.8
    rows = [torch.from_numpy(each[None]) for each in LOGITS]
    uniform = np.full((2, 1), 0.3)
    how = Draw(torch.tensor([[temperature]], dtype=torch.float64), np.array([top_p]), uniform, factors)
    amplified = Amplify(0.5, threshold)(*rows, how).quantities[0]
    plain = draw_from_one(rows[0], how).quantities[0]
    for number, factor in enumerate(factors):
        rl, base = (softmax(each / (temperature * factor)) for each in LOGITS)
        own = nucleus(rl, top_p)
        mixed = nucleus(softmax((1.5 * LOGITS[0] - 0.5 * LOGITS[1]) / (temperature * factor)), top_p)
        if threshold is not None:
            stays = np.log(rl / base) >= threshold
            mixed = own * stays + own[~stays].sum() * mixed
        np.testing.assert_allclose(amplified[number], entropy(mixed), atol=1e-12)
        np.testing.assert_allclose(plain[number], entropy(own), atol=1e-12)


def test_measuring_entropies_changes_no_response(pair):
    engine = EmbeddedEngine(pair[0], slots=16, entropy_at=(0.5, 1.0))
    requests = [request(n) for n in range(6)]
    found = asyncio.run(all_of(engine, requests))
    plain = sampled(pair[0], requests=requests)
    identical(found, plain)
    assert [one.quantities.shape for one in found] == [(len(one.tokens), 2) for one in found]
    assert all(one.quantities is None for one in plain)
