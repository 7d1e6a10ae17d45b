"""Merged statistics equal those of the whole batch, and their quantiles are those of the tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.algorithm.loss_statistics import (
    MAXIMA,
    MINIMA,
    NUM_BINS,
    QUANTILES,
    SIGN_MEANS,
    TOKEN_MEANS,
    LossStatistics,
    bin_edges,
    histogram_quantiles,
    shift_histogram,
)
from fipo_megatron.algorithm.policy_loss_config import loss_config
from tests.algorithm import reference
from tests.algorithm.partitions import PACKAGE, random_batch, split_gradient

CONFIG = loss_config("fipo", dual_clip=3.0, weight_clip=(0.8, 1.2), importance_cap=1.2, kl_coef=0.1)


@given(seed=st.integers(0, 2**32 - 1), dp=st.integers(1, 3), cp=st.sampled_from([1, 2, 4]))
def test_merge_over_micro_batches_and_ranks(seed, dp, cp):
    batch = random_batch(seed)
    whole = split_gradient(PACKAGE, batch, CONFIG)[3].metrics()
    split = split_gradient(PACKAGE, batch, CONFIG, dp=dp, cp=cp, budget=112, seed=seed)[3].metrics()
    assert split == pytest.approx(whole, rel=1e-9, abs=1e-12)


def expected_metrics(batch, config):
    """Computes every metric of the loss by its definition, token by token."""
    tokens, gaps, kls, summed = [], [], [], []
    for _, r in batch:
        tokens += reference.response_loss(r, config)[3]
        gaps += list((r.old - r.behaviour)[r.mask])
        passed = np.where(r.mask & (r.old - r.behaviour <= math.log(config.dual_clip)), r.old - r.behaviour, 0)
        summed += list(abs(reference.suffix_sum(passed, config.half_life))[r.mask])
        kls += [math.exp(b - a) - 1 + a - b for a, b in zip(r.new[r.mask], r.reference[r.mask], strict=True)]
    shift, future, weight, advantage, above, unsafe, clipped = (
        np.array(x, dtype=float) for x in zip(*tokens, strict=True)
    )
    raw, gaps, low, high = np.exp(future), np.array(gaps), *config.weight_clip
    values = {
        "tokens": len(shift),
        "sequences": len(batch),
        "dropped_sequences": reference.mini_batch([r for _, r in batch], config)[3],
        "policy_kl": -shift.mean(),
        "shift_abs_mean": abs(shift).mean(),
        "shift_abs_max": abs(shift).max(),
        "future_kl_mean": future.mean(),
        "future_kl_abs_mean": abs(future).mean(),
        "future_kl_abs_max": abs(future).max(),
        "clip_fraction": clipped.mean(),
        "clip_fraction_low": (clipped * (np.exp(shift) < 1)).mean(),
        "clip_fraction_high": (clipped * (np.exp(shift) > 1)).mean(),
        "dual_clip_fraction": (above * (advantage < 0)).mean(),
        "filtered_fraction": above.mean(),
        "safety_fraction": unsafe.mean(),
        "weight_mean": weight.mean(),
        "weight_min": weight.min(),
        "weight_max": weight.max(),
        "raw_weight_mean": raw.mean(),
        "raw_weight_min": raw.min(),
        "raw_weight_max": raw.max(),
        "weight_clip_fraction": ((weight <= low) | (weight >= high)).mean(),
        "weight_clip_fraction_upper": (weight >= high).mean(),
        "weight_clip_fraction_lower": (weight <= low).mean(),
        "advantage_mean": advantage.mean(),
        "reference_kl": np.mean(kls),
        "mismatch_abs_mean": abs(gaps).mean(),
        "mismatch_abs_max": abs(gaps).max(),
        "mismatch_future_kl_abs_mean": np.mean(summed),
        "mismatch_future_kl_abs_max": max(summed),
        "mismatch_kl": (np.exp(gaps) - 1 - gaps).mean(),
        "importance_weight_mean": np.exp(gaps).clip(max=config.importance_cap).mean(),
        "importance_truncated_fraction": (np.exp(gaps) > config.importance_cap).mean(),
    }
    for sign, chosen in (("positive", advantage > 0), ("negative", advantage <= 0)):
        if chosen.any():
            values[f"weight_clip_{sign}_upper"] = (weight >= high)[chosen].mean()
            values[f"weight_clip_{sign}_lower"] = (weight <= low)[chosen].mean()
    quantiles = {
        f"ratio_{sign}_q{100 * q:g}": np.quantile(shift[chosen], q, method="inverted_cdf")
        for sign, chosen in (("positive", advantage > 0), ("negative", advantage <= 0))
        for q in QUANTILES
        if chosen.any()
    }
    return values, quantiles


@given(seed=st.integers(0, 2**32 - 1))
def test_every_value_by_its_definition(seed):
    batch = random_batch(seed)
    config = replace(CONFIG, safety_threshold=2.0)
    metrics = split_gradient(PACKAGE, batch, config, cp=2)[3].metrics()
    values, quantiles = expected_metrics(batch, config)
    assert metrics.keys() == values.keys() | quantiles.keys()
    assert {name: metrics[name] for name in values} == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert {name: math.log(metrics[name]) for name in quantiles} == pytest.approx(quantiles, rel=0.03, abs=2e-5)


def test_every_listed_value_is_reported():
    metrics = split_gradient(PACKAGE, random_batch(0), CONFIG)[3].metrics()
    listed = set(TOKEN_MEANS) - {"entropy"} | {*SIGN_MEANS, *MAXIMA, *MINIMA}
    shadow = {name for name in listed if name.startswith("shadow_")}
    assert listed - shadow <= set(metrics)
    assert shadow <= set(split_gradient(PACKAGE, random_batch(0), replace(CONFIG, kind="dapo"))[3].metrics())
    assert {f"ratio_{sign}_q{100 * q:g}" for sign in ("positive", "negative") for q in QUANTILES} <= set(metrics)


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["dapo", "grpo"]))
def test_baselines_report_what_fipo_would_do(seed, kind):
    """F and exp F are those of FIPO on the same drift; f has another name, as the loss does not use it."""
    batch = random_batch(seed)
    fipo = split_gradient(PACKAGE, batch, CONFIG, cp=2)[3].metrics()
    baseline = split_gradient(PACKAGE, batch, replace(CONFIG, kind=kind), cp=2)[3].metrics()
    names = [name for name in baseline if name.startswith("shadow_")]
    assert len(names) == 4
    for name in (*names, "future_kl_mean", "future_kl_abs_mean", "future_kl_abs_max", "filtered_fraction"):
        assert baseline[name] == fipo[name.removeprefix("shadow_")]
    assert baseline["mismatch_future_kl_abs_mean"] == fipo["mismatch_future_kl_abs_mean"]
    assert baseline["raw_weight_max"] == fipo["raw_weight_max"]
    assert "weight_mean" not in baseline


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 3.0))
def test_quantiles_of_the_shift(seed, scale):
    """Quantiles are exact to the width of a bin: 2.9 % of the value."""
    shift = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, 20_001))
    ones = torch.ones(len(shift), dtype=torch.bool)
    counts = shift_histogram(shift, ones, ones)
    assert counts[1].sum() == 0
    for q, got in zip(QUANTILES, histogram_quantiles(counts[0], QUANTILES), strict=True):
        exact = np.quantile(shift.numpy(), q, method="inverted_cdf")
        assert got == pytest.approx(exact, rel=0.03, abs=2e-5)


def test_quantiles_are_linear_within_a_bin():
    """The quantiles of a fine grid inside one bin are those of the grid, far closer than the width of the bin."""
    shift = torch.linspace(1.0001, 1.02, 10_000, dtype=torch.float64)
    ones = torch.ones(len(shift), dtype=torch.bool)
    counts = shift_histogram(shift, ones, ones)[0]
    edges = bin_edges()
    for q in (0.1, 0.5, 0.9):
        index = int(torch.searchsorted(counts.cumsum(0), q * len(shift)))
        before = int(counts[:index].sum())
        share = (q * len(shift) - before) / int(counts[index])
        want = float(edges[index] + share * (edges[index + 1] - edges[index]))
        assert histogram_quantiles(counts, (q,))[0] == pytest.approx(want, rel=1e-12)
        assert abs(want - float(shift.quantile(q))) < 0.02


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
