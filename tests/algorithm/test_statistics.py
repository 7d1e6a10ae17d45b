"""Statistics merge to what the whole would have given, and their quantiles are those of the tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.algorithm.policy_loss import baseline
from fipo_megatron.algorithm.statistics import (
    MAXIMA,
    MINIMA,
    NUM_BINS,
    QUANTILES,
    TOKEN_MEANS,
    LossStatistics,
    histogram_quantiles,
    shift_histogram,
)
from tests.algorithm.partitions import PACKAGE, random_batch, split_gradient

CONFIG = baseline("fipo", dual_clip=3.0, weight_clip=(0.8, 1.2), importance_cap=1.2, kl_coef=0.1)


@given(seed=st.integers(0, 2**32 - 1), dp=st.integers(1, 3), cp=st.sampled_from([1, 2, 4]))
def test_merge_over_micro_batches_and_ranks(seed, dp, cp):
    batch = random_batch(seed)
    whole = split_gradient(PACKAGE, batch, CONFIG)[3].metrics()
    split = split_gradient(PACKAGE, batch, CONFIG, dp=dp, cp=cp, budget=112, seed=seed)[3].metrics()
    assert split == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_every_listed_value_is_reported():
    metrics = split_gradient(PACKAGE, random_batch(0), CONFIG)[3].metrics()
    assert set(TOKEN_MEANS) - {"entropy"} | set(MAXIMA) | set(MINIMA) <= set(metrics)
    assert {f"ratio_{sign}_q{100 * q:g}" for sign in ("positive", "negative") for q in QUANTILES} <= set(metrics)


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 3.0))
def test_quantiles_of_the_shift(seed, scale):
    """To the width of a bin: 2.9 % of the value."""
    shift = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, 20_001))
    ones = torch.ones(len(shift), dtype=torch.bool)
    counts = shift_histogram(shift, ones, ones)
    assert counts[1].sum() == 0
    for q, got in zip(QUANTILES, histogram_quantiles(counts[0], QUANTILES), strict=True):
        exact = np.quantile(shift.numpy(), q, method="inverted_cdf")
        assert got == pytest.approx(exact, rel=0.03, abs=2e-5)


def test_histogram_separates_signs_and_holds_extremes():
    shift = torch.tensor([-50.0, -1e-7, 0.0, 50.0, 1.0, 1.0])
    positive = torch.tensor([True, True, True, True, False, False])
    mask = torch.tensor([True, True, True, True, True, False])
    counts = shift_histogram(shift, positive, mask)
    assert counts.sum(1).tolist() == [4, 1]
    assert counts[0, [0, NUM_BINS // 2, -1]].tolist() == [1, 2, 1]
    assert histogram_quantiles(counts[0], (0.5,)) == [0.0]


def test_undocumented_names_and_foreign_statistics_are_refused():
    mask, histogram = torch.ones(3, dtype=torch.bool), torch.zeros(2, NUM_BINS, dtype=torch.int64)
    counts = {"tokens": mask.sum()}
    with pytest.raises(KeyError, match="new_value"):
        LossStatistics.over_tokens(mask, counts, {"new_value": mask}, {}, histogram)
    one = LossStatistics.over_tokens(mask, counts, {"entropy": mask}, {"weight_max": mask}, histogram)
    other = LossStatistics.over_tokens(mask, counts, {}, {"weight_max": mask}, histogram)
    with pytest.raises(ValueError, match="different losses"):
        one + other
