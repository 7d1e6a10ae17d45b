"""The statistics of an evaluation: avg@k, pass@k, the vote of cons@k, and bootstrap intervals over problems.

They are pure functions of numbers. docs/evaluation.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Confidence level of the intervals."""
RESAMPLES = 10_000
_BLOCK = 1 << 20
"""Number of indices drawn at a time; bounds the memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: Mean; None if it does not exist.
        low: Lower end of the confidence interval; None if it does not exist, as for a single problem.
        high: Upper end of the confidence interval; None if it does not exist.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Vote:
    """The vote over the answers to one problem.

    Attributes:
        counts: Number of votes of each answer, the most frequent first, ties in order of first occurrence.
        consensus: Most frequent answer; None without answers.
        right: Whether the consensus is right.
    """

    counts: dict[str, int]
    consensus: str | None
    right: bool


def vote(answers: Sequence[str | None], right: Sequence[bool]) -> Vote:
    """Returns the most frequent of the answers to one problem.

    If answers are equally frequent, the one of the lowest sample number wins. Responses are exchangeable, so each of
    these answers is equally likely to win, and no random draw is needed. The consensus is right if more than half of
    the responses with this answer are right; they can differ if a verifier reads more than the answer.

    Args:
        answers: Normalised answer of each response; None does not vote.
        right: The verifier's verdict on each response.
    """
    counts: dict[str, int] = {}
    verdicts: dict[str, int] = {}
    for answer, correct in zip(answers, right, strict=True):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
            verdicts[answer] = verdicts.get(answer, 0) + bool(correct)
    ordered = dict(sorted(counts.items(), key=lambda item: -item[1]))  # stable: ties keep their order
    consensus = next(iter(ordered), None)
    return Vote(ordered, consensus, consensus is not None and 2 * verdicts[consensus] > counts[consensus])


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k responses is right (Chen et al. 2021, eq. 1).

    ``1 − C(n − c, k) / C(n, k)`` is the fraction of the k-subsets of n responses that contain one of the c right ones.

    Args:
        samples: n, the number of responses.
        right: c, the number of right responses.
        k: Size of the subsets, at most n.

    Raises:
        ValueError: 0 ≤ c ≤ n or 1 ≤ k ≤ n does not hold.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} responses, {right} right: must be 1 ≤ k ≤ n and 0 ≤ c ≤ n")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def k_values(samples: int) -> list[int]:
    """Returns the values of k for which pass@k is reported: 1, 2, 4, … below n, and n."""
    return [1 << i for i in range((samples - 1).bit_length())] + [samples]


def estimate(columns: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Estimate]:
    """Returns means over problems with 95 % confidence intervals.

    The intervals are percentile bootstrap intervals over problems: each resample draws as many problems as there are,
    with replacement. For few problems the quantiles are moved outwards, from those of a normal distribution with the
    plug-in deviation to those of Student's t (Hesterberg 2015, section 5.3: "expanded percentile").

    Args:
        columns: One value per problem, for each statistic. All statistics use the same resamples.
        resamples: Number of resamples.
        seed: Seed of the resamples; equal input gives equal intervals.

    Returns:
        One estimate per statistic; without an interval for a single problem.
    """
    count = len(columns[0])
    values = [math.fsum(column) / count for column in columns]
    if count < 2:
        return [Estimate(value) for value in values]
    means = _resampled_means(np.array(columns, np.float64), resamples, seed)
    tail = _tail(count)
    ends = np.quantile(means, [tail, 1 - tail], axis=1)
    return [Estimate(value, float(low), float(high)) for value, low, high in zip(values, *ends, strict=True)]


def _resampled_means(columns: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns the means ``[S, resamples]`` of resamples of ``columns`` ``[S, P]``."""
    generator, count = np.random.default_rng(seed), columns.shape[1]
    rows = max(1, _BLOCK // count)
    means = np.empty((len(columns), resamples))
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        for number, column in enumerate(columns):
            means[number, start : start + rows] = column[drawn].mean(axis=1)
    return means


def _tail(count: int) -> float:
    """Returns the quantile of the resampled means at the lower end of the interval for ``count`` problems."""
    z = NormalDist().inv_cdf((1 - LEVEL) / 2)
    nu = count - 1
    # Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return NormalDist().cdf(t * math.sqrt(count / nu))


def wilson(count: int, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a fraction (Wilson 1927), which holds for few and for rare events, too.

    Args:
        count: Number of events.
        total: Number of trials, at least 1.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, square = count / total, z * z / total
    centre = share + square / 2
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
