"""The statistics of an evaluation: avg@k, pass@k, the vote of cons@k, and bootstrap intervals over problems.

Numbers in, numbers out. docs/evaluation.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Of the intervals."""
RESAMPLES = 10_000
_BLOCK = 1 << 20
"""Indices drawn at a time: bounds the memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: The mean; None: it does not exist.
        low: Lower end of its interval; None: it does not exist, as for a single problem.
        high: Upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Vote:
    """What the answers to a problem come to.

    Attributes:
        counts: How often each answer was given, the most frequent first, ties in the order in which they came.
        consensus: The most frequent answer; None where there is no answer.
        right: Whether the consensus is right.
    """

    counts: dict[str, int]
    consensus: str | None
    right: bool


def vote(answers: Sequence[str | None], right: Sequence[bool]) -> Vote:
    """The majority of one problem's answers.

    Of answers that are given equally often, the one that was given first wins, by number of the response: responses
    are exchangeable, so each of them is equally likely to be that one, and nothing is drawn. The consensus is right
    where the responses that gave it are; where a verifier looks at more than the answer and they differ, where more
    than half of them are.

    Args:
        answers: One per response, normalised; None has no vote.
        right: One per response: the verifier's verdict.
    """
    counts: dict[str, int] = {}
    verdicts: dict[str, int] = {}
    for answer, correct in zip(answers, right, strict=True):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
            verdicts[answer] = verdicts.get(answer, 0) + bool(correct)
    ordered = dict(sorted(counts.items(), key=lambda one: -one[1]))  # stable: ties stay in the order they came
    consensus = next(iter(ordered), None)
    return Vote(ordered, consensus, consensus is not None and 2 * verdicts[consensus] > counts[consensus])


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k responses is right (Chen et al. 2021, eq. 1).

    ``1 − C(n − c, k) / C(n, k)``: the share of the k-subsets of n responses with at least one of the c right ones.

    Args:
        samples: n.
        right: c.
        k: At most n.

    Raises:
        ValueError: not 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} responses, {right} right: must be 1 ≤ k ≤ n and 0 ≤ c ≤ n")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """The k of pass@k that are reported: 1, 2, 4, … below n, and n."""
    return [1 << i for i in range((samples - 1).bit_length())] + [samples]


def estimate(columns: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Estimate]:
    """Means over problems, with intervals that contain what they estimate in 95 % of data sets.

    The percentile bootstrap over problems: each resample draws as many problems as there are, with replacement. Its
    quantiles are moved outwards for few problems, from those of a normal distribution with the plug-in deviation to
    those of Student's t (Hesterberg 2015, section 5.3: "expanded percentile").

    Args:
        columns: One value per problem, for each statistic; all are computed on the same resamples.
        resamples: How many.
        seed: Of the resamples: equal input gives equal intervals.
    """
    count = len(columns[0])
    values = [math.fsum(column) / count for column in columns]
    if count < 2:
        return [Estimate(value) for value in values]
    means = _resampled(np.array(columns, np.float64), resamples, seed)
    tail = _tail(count)
    ends = np.quantile(means, [tail, 1 - tail], axis=1)
    return [Estimate(value, float(low), float(high)) for value, low, high in zip(values, *ends, strict=True)]


def _resampled(columns: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """``[S, resamples]`` means of ``columns`` ``[S, P]``."""
    random, count = np.random.default_rng(seed), columns.shape[1]
    rows = max(1, _BLOCK // count)
    found = np.empty((len(columns), resamples))
    for start in range(0, resamples, rows):
        drawn = random.integers(count, size=(min(rows, resamples - start), count))
        for number, column in enumerate(columns):
            found[number, start : start + rows] = column[drawn].mean(axis=1)
    return found


def _tail(count: int) -> float:
    """The quantile of the resampled means that is the lower end, for so many problems."""
    z = NormalDist().inv_cdf((1 - LEVEL) / 2)
    nu = count - 1
    # Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return NormalDist().cdf(t * math.sqrt(count / nu))
