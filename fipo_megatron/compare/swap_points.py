"""The points of a swap curve: what is sampled for each, its files, and the thresholds of target shares.

A point has two files in ``points/``: ``NAME.problems.jsonl`` with the rows of ``fipo evaluate``, and ``NAME.json`` with
its counts, written last. Its responses are in ``responses-NAME.jsonl``. The points of a model alone have a third file,
``NAME.quantities.npy``, from which thresholds are calibrated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.config import CompareConfig
from fipo_megatron.rollout.embedded.drawing import Selector
from fipo_megatron.storage.json_lines import make_directory

Role = Literal["base", "rl"]
CALIBRATED: tuple[Selector, ...] = ("delta", "js", "kl", "kl_reverse", "entropy")
"""Columns of ``NAME.quantities.npy``; SGLang servers give only the first one."""
POINTS = "points"


@dataclass(frozen=True)
class Curve:
    """A primary model with a selector.

    Attributes:
        primary: Model that draws; the other one replaces.
        selector: Quantity that selects positions.
    """

    primary: Role
    selector: Selector

    @property
    def direction(self) -> str:
        """Name of the direction."""
        return direction_of(self.primary)


@dataclass(frozen=True)
class Point:
    """Responses to all problems with one seed.

    Attributes:
        primary: Model that draws.
        seed: Seed of the responses.
        selector: Quantity that selects positions; None for the primary model alone.
        share: Target share of selected positions; None with a given threshold.
        threshold: Given threshold; None with a target share.
    """

    primary: Role
    seed: int
    selector: Selector | None = None
    share: float | None = None
    threshold: float | None = None

    @property
    def name(self) -> str:
        """Name in files."""
        if self.selector is None:
            return f"{self.primary}-seed{self.seed}"
        value = f"share{self.share:g}" if self.share is not None else f"threshold{self.threshold:g}"
        return f"{direction_of(self.primary)}-{self.selector}-{value}-seed{self.seed}"


@dataclass(frozen=True)
class PointResult:
    """The counts of a point.

    Attributes:
        threshold: Threshold of the selector; None for a model alone.
        tokens: Number of tokens of all responses.
        selected: Number of tokens drawn by the second model.
        changed: Number of selected tokens that the primary model would not have drawn.
        right: Right responses of each problem, in the order of the problems.
        checked: Responses of each problem whose check did not fail.
        truncated: Number of responses cut off at the length limit.
    """

    threshold: float | None
    tokens: int
    selected: int
    changed: int
    right: tuple[int, ...]
    checked: tuple[int, ...]
    truncated: int


def direction_of(primary: Role) -> str:
    """Returns the name of the direction in which ``primary`` draws."""
    return "base_to_rl" if primary == "base" else "rl_to_base"


def second_of(primary: Role) -> Role:
    """Returns the model that replaces tokens of ``primary``."""
    return "rl" if primary == "base" else "base"


def curves_of(compare: CompareConfig) -> Iterator[Curve]:
    """Yields the curves of a configuration."""
    roles: tuple[Role, ...] = ("base", "rl")
    for primary in roles:
        if compare.direction in ("both", direction_of(primary)):
            for selector in compare.select:
                yield Curve(primary, selector)


def points_of(compare: CompareConfig, curve: Curve, seed: int) -> list[Point]:
    """Returns the points of a curve with one seed, by target share or by threshold."""
    if compare.threshold:
        return [Point(curve.primary, seed, curve.selector, threshold=value) for value in compare.threshold]
    return [Point(curve.primary, seed, curve.selector, share) for share in sorted(compare.share)]


def threshold_for(selector: Selector, share: float, quantities: NDArray[np.float64]) -> float:
    """Returns the threshold with which this share of positions is selected.

    Args:
        selector: The quantity; ``random`` needs no calibration.
        share: Share of the positions, between 0 and 1.
        quantities: ``[T, Q]``, the first columns of :data:`CALIBRATED` at every position of the primary model's
            responses. With equal values at the threshold, fewer positions are selected.
    """
    if selector == "random":
        return 1 - share
    ordered = np.sort(quantities[:, CALIBRATED.index(selector)])
    count = min(round(share * len(ordered)), len(ordered) - 1)
    return float(ordered[count] if selector == "delta" else ordered[len(ordered) - 1 - count])


class PointFiles:
    """The files of points in a directory.

    Args:
        output: Directory of the results.

    Attributes:
        output: Directory of the results.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._points = output / POINTS

    def make_directories(self) -> None:
        """Creates the directories of the files."""
        make_directory(self._points)

    def problems(self, point: Point) -> Path:
        """Returns the file with the rows of ``fipo evaluate``."""
        return self._points / f"{point.name}.problems.jsonl"

    def quantities(self, point: Point) -> Path:
        """Returns the file with the quantities of a model alone."""
        return self._points / f"{point.name}.quantities.npy"

    def responses(self, point: Point) -> Path:
        """Returns the file with the responses."""
        return self.output / f"responses-{point.name}.jsonl"

    def result(self, point: Point) -> Path:
        """Returns the file with the counts; if it exists, the point is finished."""
        return self._points / f"{point.name}.json"

    def read(self, point: Point) -> PointResult | None:
        """Returns the counts of a point; None if it is not finished."""
        file = self.result(point)
        if not file.is_file():
            return None
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return PointResult(**values | {name: tuple(values[name]) for name in ("right", "checked")})

    @staticmethod
    def content(result: PointResult) -> str:
        """Returns the content of the file with the counts."""
        return json.dumps(asdict(result)) + "\n"
