"""The limits of a budget file, and which of them a result violates."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GIB = 2**30

LARGEST = "at most"
SMALLEST = "at least"
METRICS: Mapping[str, tuple[str, str]] = {
    "engine.tokens_per_second": (SMALLEST, "new tokens per second, all responses together"),
    "engine.seconds": (LARGEST, "seconds until the last response ended"),
    "engine.failures": (LARGEST, "responses that failed, were aborted or have another length than asked for"),
    "engine.retractions": (LARGEST, "times that a server discarded the KV cache of a running response"),
    "engine.kv_usage": (LARGEST, "largest fraction of a server's KV cache in use"),
    "actor.log_probs_seconds": (LARGEST, "seconds of the log-prob pass"),
    "actor.update_seconds": (LARGEST, "seconds of one update"),
    "actor.future_kl_fraction": (LARGEST, "seconds of Future-KL and its weights over those of both passes"),
    "actor.loss_fraction": (LARGEST, "seconds of the whole loss, Future-KL included, over those of both passes"),
    "actor.peak_gib": (LARGEST, "largest peak memory of a rank in GiB"),
    "actor.plan_error": (LARGEST, "largest |measured peak / planned peak - 1| of a rank"),
    "drift.mean": (LARGEST, "mean |difference of log-probs| in nats"),
    "drift.p99": (LARGEST, "99 % quantile of |difference of log-probs| in nats"),
    "drift.max": (LARGEST, "largest |difference of log-probs| in nats"),
    "drift.future_kl_p99": (LARGEST, "99 % quantile of |difference of Future-KL|"),
    "drift.future_kl_max": (LARGEST, "largest |difference of Future-KL|"),
}
"""Metrics that a budget can limit: the direction of the limit, and what the metric is."""


@dataclass(frozen=True)
class Limit:
    """A limit of one metric.

    Attributes:
        metric: Name in :data:`METRICS`.
        length: Length that it applies to; None: every length.
        bound: Largest or smallest accepted value.
    """

    metric: str
    length: int | None
    bound: float


def read_limits(path: Path, parts: Sequence[str], lengths: Sequence[int]) -> tuple[Limit, ...]:
    """Reads a budget file: metrics with a number, or with a number for each length.

    Args:
        path: YAML file.
        parts: Parts of the stress run.
        lengths: Lengths of the stress run.

    Raises:
        ValueError: The file cannot be read, or a limit has no metric, no number, or nothing that it could apply to.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--budget {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--budget {path}: expected limits such as 'actor.update_seconds: {{16384: 60}}'")
    limits: list[Limit] = []
    problems: list[str] = []
    for metric, given in values.items():
        problem = _metric_problem(metric, parts)
        for length, bound in (given if isinstance(given, dict) else {None: given}).items():
            problem = problem or _bound_problem(metric, length, bound, lengths)
            if not problem:
                limits.append(Limit(metric, length, float(bound)))
        if problem:
            problems.append(f"--budget {path}: {problem}")
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(limits)


def _metric_problem(metric: Any, parts: Sequence[str]) -> str:
    if metric not in METRICS:
        near = difflib.get_close_matches(str(metric), METRICS, n=1, cutoff=0.5)
        return f"{metric}: unknown metric; {f'did you mean {near[0]}?' if near else 'valid: ' + ', '.join(METRICS)}"
    part = str(metric).partition(".")[0]
    return "" if part in parts else f"{metric}: the part {part} does not run; add it to --parts {','.join(parts)}"


def _bound_problem(metric: str, length: Any, bound: Any, lengths: Sequence[int]) -> str:
    if length is not None and length not in lengths:
        return f"{metric}: {length}: is none of --lengths {','.join(map(str, lengths))}"
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
        return f"{metric} = {bound}: must be a finite number"
    return ""


def violations(limits: Sequence[Limit], results: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each limit that a result does not keep; a metric without a value keeps none.

    Args:
        limits: Limits of the budget.
        results: Results by part and length, as in ``stress.json``.
    """
    found = []
    for limit in limits:
        part, name = limit.metric.split(".")
        direction, _ = METRICS[limit.metric]
        for row in results.get(part, []):
            if limit.length not in (None, row["length"]):
                continue
            value = row.get("metrics", {}).get(name)
            if value is None:
                found.append(
                    f"{limit.metric} at {row['length']} tokens: has no value; must be {direction} {limit.bound:g}"
                )
            elif value > limit.bound if direction == LARGEST else value < limit.bound:
                found.append(
                    f"{limit.metric} at {row['length']} tokens: {value:.6g}, must be {direction} {limit.bound:g}"
                )
    return found
