"""Fewer points, smoother lines."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tools.report.runs import Floats, Series

MAX_POINTS = 1500
"""Of a series in a report: more than a chart has pixels."""


def thin(series: Series, points: int = MAX_POINTS) -> Series:
    """At most so many points: of each stretch of steps the smallest and the largest value, and both ends.

    Args:
        series: Of any length.
        points: At least 4.
    """
    if len(series) <= points:
        return series
    edges = np.linspace(0, len(series), (points - 2) // 2 + 1).astype(int)
    kept = {0, len(series) - 1}
    for begin, end in pairwise(edges.tolist()):
        part = series.values[begin:end]
        if np.isnan(part).all():
            kept.add(begin)
        else:
            kept |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def thin_together(aligned: list[Series], points: int = MAX_POINTS) -> list[Series]:
    """For series that are stacked, over the same steps: means over stretches, so that sums stay sums."""
    if not aligned or len(aligned[0]) <= points:
        return aligned
    edges = np.linspace(0, len(aligned[0]), points + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(aligned[0])))
    steps = aligned[0].steps[edges]
    return [Series(steps, np.add.reduceat(series.values, edges) / counts) for series in aligned]


def smoothed(series: Series, window: int) -> Floats:
    """Centred means over so many steps, of what is finite; a window of 1 or less changes nothing."""
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
