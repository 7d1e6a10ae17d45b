"""Statistics against values by hand, and estimators against the truth of simulations that also show a wrong one."""

import math

import numpy as np
import pytest

from fipo_megatron.evaluation import estimates
from fipo_megatron.evaluation.answer_normalisation import normalise_answer
from fipo_megatron.evaluation.estimates import estimate, k_values, pass_at_k, vote

RIGHT = (0, 1, 2, 4)
"""Right answers of four to each problem of the fixture."""


def test_avg_and_pass_by_hand():
    avg, *passes = estimate([[c / 4 for c in RIGHT], *([pass_at_k(4, c, k) for c in RIGHT] for k in k_values(4))])
    assert avg.value == (0 + 0.25 + 0.5 + 1) / 4
    assert k_values(4) == [1, 2, 4]
    # k = 2: subsets of two of four without a right one are 6, 3, 1 and 0 of 6.
    assert [mean.value for mean in passes] == pytest.approx([7 / 16, (0 + 3 / 6 + 5 / 6 + 1) / 4, 3 / 4])
    assert [k_values(n) for n in (1, 2, 3, 32)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32]]


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_invalid_pass_at_k_is_refused(samples, right, k):
    with pytest.raises(ValueError, match="must be 1 ≤ k ≤ n and 0 ≤ c ≤ n"):
        pass_at_k(samples, right, k)


def test_pass_at_k_is_unbiased_and_the_naive_estimate_is_not():
    p, n, k, draws = 0.15, 8, 4, 40_000
    right = np.random.default_rng(0).binomial(n, p, draws)
    truth = 1 - (1 - p) ** k
    unbiased = np.array([pass_at_k(n, c, k) for c in range(n + 1)])[right]
    naive = (1 - (1 - np.arange(n + 1) / n) ** k)[right]
    error = unbiased.std() / math.sqrt(draws)
    assert abs(unbiased.mean() - truth) < 3 * error
    assert abs(naive.mean() - truth) > 20 * error


def test_votes_by_hand():
    most = vote(["7", "5", "5", None], [False, True, True, False])
    assert (most.counts, most.consensus, most.right) == ({"5": 2, "7": 1}, "5", True)
    assert not vote(["7", "7", "5"], [False, False, True]).right
    nobody = vote([None, None], [True, False])
    assert (nobody.counts, nobody.consensus, nobody.right) == ({}, None, False)
    assert not vote(["5", "5"], [True, False]).right, "half of them right is not right"


def test_a_tie_goes_to_the_answer_that_came_first():
    tied = vote(["3", "5", "5", "7", "7"], [False, True, True, False, False])
    assert (list(tied.counts), tied.consensus, tied.right) == (["5", "7", "3"], "5", True)
    assert vote(["7", "5", "7", "5"], [False, True, False, True]).consensus == "7"


def test_ties_favour_nobody():
    """Each of three tied answers wins a third of the time over shuffled responses, so cons@2 has the mean of avg@2."""
    generator = np.random.default_rng(0)
    answers = ["a", "a", "b", "b", "c", "c", "d"]
    won = [vote([str(x) for x in generator.permutation(answers)], [True] * 7).consensus for _ in range(6000)]
    assert [won.count(x) / 6000 for x in "abc"] == pytest.approx([1 / 3] * 3, abs=0.02)


@pytest.mark.parametrize(
    ("verifier", "extracted", "expected"),
    [
        ("math", "073", "73"),
        ("math", r"\dfrac{1}{2}", "1/2"),
        ("math", "0.5", "1/2"),
        ("math", "1,000", "1000"),
        ("math", "1 1/2", "3/2"),
        ("math", "5 7", "5 7"),
        ("math", "100, 200", "100,200"),
        ("math", "1e-7", "1/10000000"),
        ("math", "5, as shown above", "5"),
        ("math", r"x \cdot 2", r"x\cdot2"),
        ("math", None, None),
        ("math", " ", None),
        ("exact", " a  b\n", "a b"),
        ("exact", "073", "073"),
        ("python:some.verifier", "0.50 ", "0.50"),
        ("https://service", "\ud800", "?"),
    ],
)
def test_what_a_response_votes_for(verifier, extracted, expected):
    assert normalise_answer(verifier, extracted) == expected


def coverage(problems, sets, interval):
    """Returns the fraction of intervals of avg@8 that contain the true mean; problems differ in difficulty."""
    generator, covered = np.random.default_rng(1), 0
    for _ in range(sets):
        right = generator.binomial(8, generator.beta(1, 2, problems))
        low, high = interval(list(right / 8))
        covered += low <= 1 / 3 <= high
    return covered / sets


def expanded(values):
    (mean,) = estimate([values], resamples=1000)
    return mean.low, mean.high


def plain(values):
    means = estimates._resampled_means(np.array([values]), 1000, 0)[0]
    return np.quantile(means, [0.025, 0.975])


def test_intervals_contain_the_truth_as_often_as_they_say():
    assert 0.93 <= coverage(60, 1500, expanded) <= 0.97
    assert 0.93 <= coverage(10, 1500, expanded) <= 0.97
    assert coverage(10, 1500, plain) < 0.93, "the check can fail: few problems need the wider quantiles"


def test_the_interval_of_pass_at_k_contains_the_truth():
    """The truth of pass@4 is 1 − E[(1 − p)⁴] = 1/3 for p of Beta(1, 8); each problem has eight responses."""
    generator, covered = np.random.default_rng(2), 0
    table = [pass_at_k(8, c, 4) for c in range(9)]
    for _ in range(1500):
        low, high = expanded([table[c] for c in generator.binomial(8, generator.beta(1, 8, 80))])
        covered += low <= 1 / 3 <= high
    assert 0.93 <= covered / 1500 <= 0.97


def test_intervals_are_reproducible_and_absent_for_one_problem():
    values = [list(np.random.default_rng(0).random(20))]
    assert estimate(values) == estimate(values)
    assert estimate(values) != estimate(values, seed=1)
    (single,) = estimate([[0.25]])
    assert (single.value, single.low, single.high) == (0.25, None, None)
    (all_right,) = estimate([[1.0] * 10])
    assert (all_right.low, all_right.high) == (1, 1)


def test_many_problems_are_resampled_in_blocks(monkeypatch):
    values = [list(np.random.default_rng(0).random(100))]
    whole = estimate(values, resamples=50)
    monkeypatch.setattr(estimates, "_BLOCK", 300)
    assert estimate(values, resamples=50) == whole
