"""The distribution of response lengths against closed forms and random draws."""

import math

import numpy as np
import pytest

from fipo_megatron.plan.response_lengths import ResponseLengths

CASES = [ResponseLengths(4000, 0.6, 20_480), ResponseLengths(9000, 1.0, 20_480), ResponseLengths(300, 0.3, 10_240)]


@pytest.mark.parametrize("lengths", CASES)
def test_mean_and_cut_fraction_against_draws(lengths):
    draws = np.random.default_rng(1).lognormal(math.log(lengths.median), lengths.spread, 400_000)
    assert lengths.mean == pytest.approx(np.minimum(draws, lengths.limit).mean(), rel=0.01)
    assert lengths.cut_fraction == pytest.approx((draws >= lengths.limit).mean(), abs=0.005)
    cut = np.minimum(draws, lengths.limit)
    assert lengths.mean_while_running == pytest.approx((cut**2).mean() / (2 * cut.mean()), rel=0.02)


@pytest.mark.parametrize("lengths", CASES)
def test_samples_have_the_mean(lengths):
    assert lengths.sample(2048).mean() == pytest.approx(lengths.mean, rel=0.005)
    groups = lengths.sample_groups(128, 16)
    assert groups.shape == (128, 16)
    assert groups.mean() == pytest.approx(lengths.mean, rel=0.03)
    assert groups.max() <= lengths.limit
    assert (groups == lengths.sample_groups(128, 16)).all()


def test_responses_to_one_prompt_are_alike():
    alike = ResponseLengths(1000, 0.5, 10**6, between=1.0).sample_groups(50, 8)
    assert (alike == alike[:, :1]).all()
    apart = np.log(ResponseLengths(1000, 0.5, 10**6, between=0.0).sample_groups(50, 8))
    assert apart.mean(axis=1).std() < 1e-3
    half = np.log(ResponseLengths(1000, 0.5, 10**6, between=0.5).sample_groups(400, 64))
    assert half.mean(axis=1).var() == pytest.approx(0.125, rel=0.05)
    assert half.var(axis=1).mean() == pytest.approx(0.125, rel=0.1)


def test_the_mean_after_the_cut_is_found():
    for mean in (200, 5000, 12_000, 20_000):
        found = ResponseLengths.from_mean(mean, 20_480)
        assert found.mean == pytest.approx(mean, rel=1e-6)
    assert ResponseLengths.from_mean(500, 1000, spread=0).median == pytest.approx(500)


def test_mean_and_median_give_the_spread():
    """The mean of a log-normal is its median times exp(σ² / 2)."""
    found = ResponseLengths.from_mean_and_median(3000, 2000, 10**9)
    assert found.spread == pytest.approx(math.sqrt(2 * math.log(1.5)))
    assert found.mean == pytest.approx(3000)


def test_values_out_of_range():
    with pytest.raises(ValueError, match="mean: must be > 0 and below the limit of 100 tokens, got 100"):
        ResponseLengths.from_mean(100, 100)
    with pytest.raises(ValueError, match="mean: must be at least the median of 5 tokens, got 4"):
        ResponseLengths.from_mean_and_median(4, 5, 100)
    for change, text in (({"median": 0}, "median"), ({"spread": -1}, "spread"), ({"between": 2}, "between")):
        with pytest.raises(ValueError, match=f"{text}: must be"):
            ResponseLengths(**({"median": 1, "spread": 1, "limit": 10} | change))
