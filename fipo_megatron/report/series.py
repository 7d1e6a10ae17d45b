"""Thinning and smoothing of series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fipo_megatron.report.runs import Floats, Series, Steps

MAX_POINTS = 1500
"""Maximum number of values of a series in a report; more than a chart has pixels."""


@dataclass(frozen=True)
class Thinned:
    """A series of bounded length.

    Attributes:
        line: The series itself, or its means over intervals of steps, at the middle step of each.
        extremes: Smallest and largest values of the intervals; None if nothing was left out.
    """

    line: Series
    extremes: tuple[Series, Series] | None = None


def thin(series: Series, points: int = MAX_POINTS) -> Thinned:
    """Reduces a series to at most ``points`` values: mean, minimum and maximum of each interval of steps.

    Extremes alone, smoothed, would not give the mean. Values that are not finite are left out.
    """
    if len(series) <= points:
        return Thinned(series)
    begin, steps = _intervals(series, points // 3)
    finite = np.isfinite(series.values)
    counts = np.add.reduceat(finite.astype(np.int64), begin)
    sums = np.add.reduceat(np.where(finite, series.values, 0.0), begin)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    low, high = (extreme.reduceat(series.values, begin) for extreme in (np.fmin, np.fmax))
    return Thinned(Series(steps, mean), (Series(steps, low), Series(steps, high)))


def _intervals(series: Series, count: int) -> tuple[Steps, Steps]:
    """Returns the begin indices of ``count`` intervals, and the middle step of each."""
    edges = np.linspace(0, len(series), count + 1).astype(np.int64)
    return edges[:-1], series.steps[(edges[:-1] + edges[1:] - 1) // 2]


def thin_together(aligned: list[Series], points: int = MAX_POINTS) -> list[Series]:
    """Reduces series over the same steps to means over intervals, so that stacked sums stay correct."""
    if not aligned or len(aligned[0]) <= points:
        return aligned
    begin, steps = _intervals(aligned[0], points)
    counts = np.diff(np.append(begin, len(aligned[0])))
    return [Series(steps, np.add.reduceat(series.values, begin) / counts) for series in aligned]


def smoothed(series: Series, window: int) -> Floats:
    """Returns centred means of the finite values over ``window`` steps; a window of 1 or less changes nothing."""
    if window <= 1 or not len(series):
        return series.values
    finite = np.isfinite(series.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, series.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    begin = np.searchsorted(series.steps, series.steps - window / 2, side="left")
    end = np.searchsorted(series.steps, series.steps + window / 2, side="right")
    count = counts[end] - counts[begin]
    mean = (sums[end] - sums[begin]) / np.maximum(count, 1)
    return np.where(finite & (count > 0), mean, np.nan)
