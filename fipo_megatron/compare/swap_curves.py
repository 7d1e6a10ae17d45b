"""The curves of ``fipo compare swap``: accuracy over the share of swapped tokens, from the files of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.compare.swap_points import (
    Curve,
    Point,
    PointFiles,
    PointResult,
    Role,
    curves_of,
    points_of,
    second_of,
)
from fipo_megatron.config import CompareConfig
from fipo_megatron.evaluation.estimates import estimate

RECOVERED = 0.9
"""Part of the gap between the models at which curves are read."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Pooled:
    """A point with all its seeds.

    Attributes:
        results: Counts by seed.
        accuracies: ``[P]``, mean accuracy of each problem whose responses were checked, otherwise NaN.
    """

    results: tuple[PointResult, ...]
    accuracies: NDArray[np.float64]

    @classmethod
    def of(cls, results: Sequence[PointResult]) -> Pooled:
        """Returns the pooled counts."""
        right, checked = (np.sum([getattr(each, name) for each in results], axis=0) for name in ("right", "checked"))
        return cls(tuple(results), np.where(checked > 0, right / np.maximum(checked, 1), np.nan))

    def share(self, what: str) -> float:
        """Returns the share of tokens that are ``selected`` or ``changed``."""
        tokens = sum(each.tokens for each in self.results)
        return float(sum(getattr(each, what) for each in self.results) / tokens)

    def row(self) -> dict[str, Any]:
        """Returns the numbers of the point."""
        [mean] = estimate([self.accuracies[np.isfinite(self.accuracies)].tolist()])
        responses = sum(sum(each.checked) for each in self.results)
        return {
            "selected": self.share("selected"),
            "changed": self.share("changed"),
            "accuracy": mean.value,
            "low": mean.low,
            "high": mean.high,
            "by_seed": [sum(each.right) / max(1, sum(each.checked)) for each in self.results],
            "responses": responses,
            "tokens": sum(each.tokens for each in self.results),
            "truncated": sum(each.truncated for each in self.results),
        }


def summarise(compare: CompareConfig, seeds: Sequence[int], files: PointFiles) -> dict[str, Any]:
    """Returns the models' own accuracies and all curves.

    Args:
        compare: Configuration of the comparison.
        seeds: Seeds of the points.
        files: Files of the finished points.
    """

    def pooled(points: Sequence[Point]) -> Pooled:
        found = [files.read(point) for point in points]
        return Pooled.of([each for each in found if each is not None])

    roles: tuple[Role, ...] = ("base", "rl")
    alone = {role: pooled([Point(role, seed) for seed in seeds]) for role in roles}
    curves = []
    for curve in curves_of(compare):
        by_seed = [points_of(compare, curve, seed) for seed in seeds]
        kinds = list(zip(*by_seed, strict=True))
        curves.append(_curve(curve, alone, [(points[0], pooled(points)) for points in kinds]))
    difference = alone["rl"].accuracies - alone["base"].accuracies
    [gap] = estimate([difference[np.isfinite(difference)].tolist()])
    return {"alone": {role: each.row() for role, each in alone.items()}, "gap": asdict(gap), "curves": curves}


def _curve(curve: Curve, alone: Mapping[Role, Pooled], points: Sequence[tuple[Point, Pooled]]) -> dict[str, Any]:
    start, end = alone[curve.primary], alone[second_of(curve.primary)]
    rows = []
    for point, found in points:
        gap = np.nanmean(end.accuracies) - np.nanmean(start.accuracies)
        row: dict[str, Any] = {"share": point.share, "threshold": found.results[0].threshold} | found.row()
        row["recovered"] = float((np.nanmean(found.accuracies) - np.nanmean(start.accuracies)) / gap) if gap else None
        rows.append(row)
    columns = [start, *(found for _, found in points)]
    return {
        "direction": curve.direction,
        "selector": curve.selector,
        "points": rows,
        f"share_at_{RECOVERED:.0%}": {
            what: share_with_interval(columns, end, [0.0, *(found.share(what) for _, found in points)])
            for what in ("selected", "changed")
        },
    }


def share_with_interval(columns: Sequence[Pooled], end: Pooled, shares: Sequence[float]) -> dict[str, float | None]:
    """Returns the share at which a curve first recovers :data:`RECOVERED` of the gap, with a bootstrap interval.

    The interval is over problems, the same resamples for all curves. A value is None if it is beyond the largest share.

    Args:
        columns: Points of the curve, the primary model alone first.
        end: The second model alone.
        shares: Share of swapped tokens at each point.
    """
    accuracies = np.array([each.accuracies for each in (*columns, end)])
    accuracies = accuracies[:, np.isfinite(accuracies).all(axis=0)]
    count = accuracies.shape[1]
    if not count:
        return dict.fromkeys(("value", "low", "high"))
    generator = np.random.default_rng(0)
    drawn = [accuracies[:, generator.integers(count, size=count)].mean(axis=1) for _ in range(_RESAMPLES)]
    found = np.array([crossing(shares, means[:-1], means[-1]) for means in drawn])
    value = crossing(shares, accuracies[:-1].mean(axis=1), accuracies[-1].mean())
    ends = np.quantile(found, [0.025, 0.975], method="nearest")
    return {
        name: float(share) if np.isfinite(share) else None
        for name, share in zip(("value", "low", "high"), (value, *ends), strict=True)
    }


def crossing(shares: Sequence[float], accuracies: NDArray[np.float64], end: float) -> float:
    """Returns the share at which accuracy first recovers :data:`RECOVERED` of the gap, interpolated; else infinity.

    Args:
        shares: Share of swapped tokens at each point; 0 first.
        accuracies: Accuracy at each point.
        end: Accuracy of the second model alone.
    """
    gap = end - accuracies[0]
    if gap == 0:
        return float("inf")
    recovered = (np.asarray(accuracies) - accuracies[0]) / gap
    order = np.argsort(shares, kind="stable")
    for before, after in pairwise(order):
        if recovered[after] >= RECOVERED:
            part = (RECOVERED - recovered[before]) / (recovered[after] - recovered[before])
            return float(shares[before] + part * (shares[after] - shares[before]))
    return float("inf")


def text_table(result: Mapping[str, Any]) -> str:
    """Formats the models alone, every point, and the shares at which curves recover most of the gap."""
    heads = ["direction", "selector", "target", "threshold", "selected", "changed", "accuracy", "recovered"]
    rows = [[f"{role} alone", "", "", "", "0.0 %", "0.0 %", accuracy(row), ""] for role, row in result["alone"].items()]
    for curve in result["curves"]:
        for row in curve["points"]:
            target = "" if row["share"] is None else _percent(row["share"])
            shares = [_percent(row[name]) for name in ("selected", "changed")]
            recovered = "–" if row["recovered"] is None else f"{100 * row['recovered']:.0f} %"
            names = [curve["direction"].replace("_", " "), curve["selector"]]
            rows.append([*names, target, f"{row['threshold']:.4g}", *shares, accuracy(row), recovered])
    ends = [["direction", "selector", f"selected at {RECOVERED:.0%}", f"changed at {RECOVERED:.0%}"]]
    for curve in result["curves"]:
        cells = [reached(curve, what) for what in ("selected", "changed")]
        ends.append([curve["direction"].replace("_", " "), curve["selector"], *cells])
    gap = result["gap"]
    unclear = gap["low"] is None or gap["low"] <= 0 <= gap["high"]
    note = "\n\nThe gap between the models is not distinguishable from 0, and no part of it can be read." * unclear
    return (
        f"{_aligned([heads, *rows])}\n\nShare of tokens at which {RECOVERED:.0%} of the gap between the models is "
        f"recovered, interpolated:\n\n{_aligned(ends)}\n\nIn brackets: 95 % bootstrap intervals over problems.{note}"
    )


def accuracy(row: Mapping[str, Any]) -> str:
    """Formats the accuracy of a point, with its interval if it has one."""
    text = _percent(row["accuracy"])
    return text if row["low"] is None else f"{text} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def reached(curve: Mapping[str, Any], what: str) -> str:
    """Formats the share of ``selected`` or ``changed`` tokens at which a curve recovers :data:`RECOVERED` of the gap.

    A share that is not reached is above the largest measured one, and has no interval.

    Args:
        curve: A curve of ``swap.json``.
        what: ``selected`` or ``changed``.
    """
    largest, at = max(row[what] for row in curve["points"]), curve[f"share_at_{RECOVERED:.0%}"][what]
    value, low, high = (
        f"> {100 * largest:.1f}" if share is None else f"{100 * share:.1f}"
        for share in (at["value"], at["low"], at["high"])
    )
    return f"{value} %" if at["value"] is None else f"{value} % ({low}–{high})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("   ".join(left + right).rstrip())
    return "\n".join(lines)
