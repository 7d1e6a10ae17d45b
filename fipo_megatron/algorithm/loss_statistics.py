"""Statistics of the loss that merge over micro-batches, context-parallel and data-parallel ranks.

Three tensors hold all of them (sums, maxima, histograms), so a step costs three small all-reduces and three copies to
the host, whatever the number of values. They cover every response token of the loss inputs, dropped responses included,
as in the release.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

SIGNS = ("positive", "negative")
"""Rows of the histograms: tokens with an advantage > 0, and all others. An advantage of 0 counts as negative."""

QUANTILES = (0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999)

_BINS_PER_SIDE = 512
_SMALLEST_SHIFT = 1e-5
_LARGEST_SHIFT = 20.0
NUM_BINS = 2 * _BINS_PER_SIDE + 1

COUNTS = ("tokens", "sequences", "dropped_sequences")

TOKEN_MEANS = (
    "policy_kl",  # mean of −d: the k1 estimate of KL(π_old ‖ π_θ)
    "shift_abs_mean",
    "future_kl_mean",
    "future_kl_abs_mean",
    "clip_fraction",
    "clip_fraction_low",  # A < 0 and r < 1 − ε_low; spikes before a collapse (Fig. 2)
    "clip_fraction_high",
    "dual_clip_fraction",
    "filtered_fraction",
    "weight_mean",
    "raw_weight_mean",
    "weight_clip_fraction",
    "shadow_weight_mean",  # the baselines: f that FIPO would use
    "shadow_weight_clip_fraction",
    "weight_clip_fraction_upper",
    "weight_clip_fraction_lower",
    "safety_fraction",
    "advantage_mean",
    "entropy",
    "reference_kl",
    "mismatch_abs_mean",
    "mismatch_kl",  # k3 estimate of KL(π_behaviour ‖ π_old)
    "mismatch_future_kl_abs_mean",
    "importance_weight_mean",
    "importance_truncated_fraction",
)
"""Means over the tokens of the mask."""

SIGN_MEANS = tuple(f"weight_clip_{sign}_{side}" for sign in SIGNS for side in ("upper", "lower"))
"""Means over the tokens of the mask whose advantage has this sign; absent if there are none."""

MAXIMA = (
    *("weight_max", "raw_weight_max", "shadow_weight_max", "shift_abs_max", "future_kl_abs_max"),
    *("mismatch_abs_max", "mismatch_future_kl_abs_max"),
)
MINIMA = ("weight_min", "raw_weight_min", "shadow_weight_min")


@dataclass(frozen=True)
class LossStatistics:
    """Mergeable statistics of one or more micro-batches.

    The configuration of the loss determines which values exist, so they are the same on every rank.

    Attributes:
        sum_names: Names of ``sums``, from ``COUNTS``, ``TOKEN_MEANS`` and ``SIGN_MEANS``.
        extremum_names: Names of ``maxima``, from ``MAXIMA`` and ``MINIMA``.
        sums: Sums over tokens or counts, ``[len(sum_names)]`` float64.
        maxima: Maxima over tokens, ``[len(extremum_names)]`` float64; minima are stored negated; −inf without tokens.
        histograms: Log-prob shifts of the tokens with positive (row 0) and other (row 1) advantage, ``[2, NUM_BINS]``
            int64.
    """

    sum_names: tuple[str, ...]
    extremum_names: tuple[str, ...]
    sums: Tensor
    maxima: Tensor
    histograms: Tensor

    @classmethod
    def over_tokens(
        cls,
        mask_T: Tensor,
        counts: dict[str, Tensor],
        means: dict[str, Tensor],
        extrema: dict[str, Tensor],
        histograms: Tensor,
    ) -> LossStatistics:
        """Reduces per-token values ``[T]`` over a mask.

        Args:
            mask_T: Tokens to reduce over, ``[T]`` bool.
            counts: Scalars by name, from ``COUNTS``.
            means: Per-token values ``[T]`` by name, from ``TOKEN_MEANS`` and ``SIGN_MEANS``.
            extrema: Per-token values ``[T]`` by name, from ``MAXIMA`` and ``MINIMA``.
            histograms: Result of :func:`shift_histogram`.

        Raises:
            KeyError: This module does not list a name.
        """
        unknown = set(counts) - set(COUNTS) | set(means) - {*TOKEN_MEANS, *SIGN_MEANS}
        unknown |= set(extrema) - set(MAXIMA + MINIMA)
        if unknown:
            raise KeyError(f"statistics without an entry in {__name__}: {sorted(unknown)}")
        sums = [count.double() for count in counts.values()]
        sums += [torch.where(mask_T, value.double(), 0.0).sum() for value in means.values()]
        signed = {name: -value if name in MINIMA else value for name, value in extrema.items()}
        maxima = [torch.where(mask_T, value.double(), -math.inf).amax() for value in signed.values()]
        return cls((*counts, *means), tuple(extrema), torch.stack(sums), torch.stack(maxima), histograms)

    def __add__(self, other: LossStatistics) -> LossStatistics:
        if (self.sum_names, self.extremum_names) != (other.sum_names, other.extremum_names):
            raise ValueError("statistics of different losses cannot be merged")
        return replace(
            self,
            sums=self.sums + other.sums,
            maxima=torch.maximum(self.maxima, other.maxima),
            histograms=self.histograms + other.histograms,
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> LossStatistics:
        """Merges over a process group with three all-reduces. Every rank of the group must call it."""
        sums, maxima, histograms = self.sums.clone(), self.maxima.clone(), self.histograms.clone()
        dist.all_reduce(sums, group=group)
        # A maximum over ranks may lose a NaN; infinity survives it and is not finite either.
        maxima = maxima.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(histograms, group=group)
        return replace(self, sums=sums, maxima=maxima, histograms=histograms)

    def metrics(self) -> dict[str, float]:
        """Returns the values by name, after one copy to the host per tensor; counts only if there are no tokens."""
        values = dict(zip(self.sum_names, self.sums.tolist(), strict=True))
        tokens = values["tokens"]
        if not tokens:
            return {name: values[name] for name in COUNTS}
        tokens_of_sign = dict(zip(SIGNS, self.histograms.sum(1).tolist(), strict=True))
        total = {name: tokens_of_sign[name.split("_")[2]] if name in SIGN_MEANS else tokens for name in values}
        values = {
            name: value if name in COUNTS else value / total[name] for name, value in values.items() if total[name]
        }
        for name, value in zip(self.extremum_names, self.maxima.tolist(), strict=True):
            values[name] = -value if name in MINIMA else value
        for sign, counts in zip(SIGNS, self.histograms.cpu(), strict=True):
            if counts.any():
                for q, shift in zip(QUANTILES, histogram_quantiles(counts, QUANTILES), strict=True):
                    values[f"ratio_{sign}_q{100 * q:g}"] = math.exp(shift)
        return values


def bin_edges(device: torch.device | str = "cpu") -> Tensor:
    """Returns the edges of the shift histogram, ``[NUM_BINS + 1]`` float64.

    The bins are symmetric, logarithmic and 2.9 % wide, with one bin around 0. Shifts beyond ±20 fall in the outermost
    bins.
    """
    side = torch.logspace(
        math.log10(_SMALLEST_SHIFT), math.log10(_LARGEST_SHIFT), _BINS_PER_SIDE + 1, dtype=torch.float64, device=device
    )
    return torch.cat([-side.flip(0), side])


def shift_histogram(shift_T: Tensor, positive_T: Tensor, mask_T: Tensor) -> Tensor:
    """Counts log-prob shifts by the sign of the advantage.

    Args:
        shift_T: d, ``[T]``.
        positive_T: Tokens with an advantage > 0, ``[T]`` bool.
        mask_T: Tokens to count, ``[T]`` bool.

    Returns:
        Counts by sign and bin, ``[2, NUM_BINS]`` int64.
    """
    edges = bin_edges(shift_T.device).to(shift_T.dtype)
    bin_T = torch.bucketize(shift_T, edges[1:-1], right=True)
    row_T = torch.where(positive_T, 0, NUM_BINS)
    counts = torch.zeros(2 * NUM_BINS, dtype=torch.int64, device=shift_T.device)
    return counts.index_add_(0, bin_T + row_T, mask_T.long()).view(2, NUM_BINS)


def histogram_quantiles(counts: Tensor, quantiles: tuple[float, ...]) -> list[float]:
    """Returns quantiles of the shift from ``[NUM_BINS]`` counts.

    A quantile is interpolated linearly within its bin; the bin around 0 counts as exactly 0.
    """
    total = int(counts.sum())
    edges = bin_edges()
    edges[_BINS_PER_SIDE : _BINS_PER_SIDE + 2] = 0.0
    cumulative = counts.cumsum(0)
    result = []
    for q in quantiles:
        rank = min(max(q * total, 1e-9), float(total))
        index = int(torch.searchsorted(cumulative, rank))
        inside = 1 - (float(cumulative[index]) - rank) / float(counts[index])
        result.append(float(torch.lerp(edges[index], edges[index + 1], inside)))
    return result
