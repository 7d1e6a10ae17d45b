"""The distribution of response lengths: a log-normal, cut at the length limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEAN_FRACTION = 0.5
"""Default mean response as a fraction of ``rollout.max_response_tokens``: FIPO's 32B run grew to 10,000 of 20,480
tokens (arXiv 2603.19835, abstract)."""

SPREAD = 0.6
"""Default standard deviation of the logarithm of the length (assumed): the longest of 8,192 responses is 9 times the
median if nothing is cut."""

BETWEEN = 0.5
"""Default fraction of the variance of the logarithm of the length that lies between prompts (assumed)."""

_NORMAL = NormalDist()
_SEED = 0


@lru_cache(maxsize=256)
def _normal_quantiles(count: int) -> NDArray[np.float64]:
    return np.array([_NORMAL.inv_cdf((number + 0.5) / count) for number in range(count)])


@dataclass(frozen=True)
class ResponseLengths:
    """Lengths of responses in tokens, and of their prompts.

    Attributes:
        median: Median of the log-normal before the cut.
        spread: Standard deviation of the logarithm of the length.
        limit: Length at which responses are cut off.
        prompt: Mean length of a prompt.
        between: Fraction of ``spread`` squared that lies between prompts: hard problems have long responses.
    """

    median: float
    spread: float
    limit: int
    prompt: float = 150.0
    between: float = BETWEEN

    def __post_init__(self) -> None:
        """Raises ValueError if a value is out of range."""
        for name in ("median", "limit", "prompt"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be > 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.spread < math.inf:
            raise ValueError(f"spread: must be >= 0 and finite, got {self.spread}")
        if not 0 <= self.between <= 1:
            raise ValueError(f"between: must be in [0, 1], got {self.between}")

    @classmethod
    @lru_cache(maxsize=256)
    def from_mean(cls, mean: float, limit: int, spread: float = SPREAD, prompt: float = 150.0) -> ResponseLengths:
        """Returns the distribution whose mean after the cut is given.

        Raises:
            ValueError: The mean is not below the limit.
        """
        if not 0 < mean < limit:
            raise ValueError(f"mean: must be > 0 and below the limit of {limit} tokens, got {mean:g}")
        low, high = 1e-3, limit * 1e6
        for _ in range(100):
            middle = math.sqrt(low * high)
            if cls(middle, spread, limit, prompt).mean < mean:
                low = middle
            else:
                high = middle
        return cls(high, spread, limit, prompt)

    @classmethod
    def from_mean_and_median(cls, mean: float, median: float, limit: int, prompt: float = 150.0) -> ResponseLengths:
        """Returns the distribution with this median whose mean before the cut is given.

        Raises:
            ValueError: The mean is below the median.
        """
        if mean < median:
            raise ValueError(f"mean: must be at least the median of {median:g} tokens, got {mean:g}")
        return cls(median, math.sqrt(2 * math.log(mean / median)), limit, prompt)

    @property
    def cut_fraction(self) -> float:
        """Fraction of responses that reach the limit."""
        if not self.spread:
            return float(self.median >= self.limit)
        return 1 - _NORMAL.cdf(math.log(self.limit / self.median) / self.spread)

    @property
    def mean(self) -> float:
        """Mean length after the cut: E[min(X, limit)]."""
        if not self.spread:
            return min(self.median, self.limit)
        z = math.log(self.limit / self.median) / self.spread
        below = self.median * math.exp(self.spread**2 / 2) * _NORMAL.cdf(z - self.spread)
        return below + self.limit * self.cut_fraction

    def sample(self, count: int) -> NDArray[np.int64]:
        """Returns the quantiles (i + ½) / count of the cut distribution: a sample without chance, in rising order."""
        values = self.median * np.exp(self.spread * _normal_quantiles(count))
        return np.clip(np.rint(values), 1, self.limit).astype(np.int64)

    def sample_groups(self, groups: int, size: int) -> NDArray[np.int64]:
        """Returns lengths of the responses of some prompts in random order, ``[groups, size]``; always the same.

        Quantiles of the prompts' means are combined with quantiles of the deviations from them.
        """
        random = np.random.default_rng(_SEED)
        of_prompt = random.permutation(_normal_quantiles(groups))
        deviation = random.permuted(np.tile(_normal_quantiles(size), (groups, 1)), axis=1)
        z = math.sqrt(self.between) * of_prompt[:, None] + math.sqrt(1 - self.between) * deviation
        return np.clip(np.rint(self.median * np.exp(self.spread * z)), 1, self.limit).astype(np.int64)

    @property
    def mean_while_running(self) -> float:
        """Mean number of response tokens so far of a response that runs at a random time: E[X²] / 2 E[X]."""
        return _mean_while_running(self)

    def as_dict(self) -> dict[str, Any]:
        """Returns the values as plain data."""
        return {
            "median": self.median,
            "spread": self.spread,
            "limit": self.limit,
            "prompt": self.prompt,
            "mean_after_cut": self.mean,
            "cut_fraction": self.cut_fraction,
            "between": self.between,
        }


@lru_cache(maxsize=256)
def _mean_while_running(lengths: ResponseLengths) -> float:
    sample = lengths.sample(1024).astype(np.float64)
    return float((sample**2).mean() / (2 * sample.mean()))
