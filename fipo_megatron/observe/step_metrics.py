"""Computes the metrics of a step from its groups and updates, by the tags of :mod:`.observe.metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.observe.metrics import DROPPED_COUNTS, FAILURE_COUNTS, OF_UPDATES, SAMPLER_COUNTS

if TYPE_CHECKING:
    from fipo_megatron.actor.update_metrics import NoiseFloor, UpdateMetrics
    from fipo_megatron.rollout.sampler import SampledGroups
    from fipo_megatron.rollout.weight_sync.probe import ProbeShift


def rollout_metrics(sampled: SampledGroups | None, step: int) -> dict[str, Any]:
    """Returns the metrics of the sampled groups and the sampler's counts, independent of the order of the groups."""
    if sampled is None:
        return {}
    counts: dict[str, float] = {f"sampler/{name}": sampled.statistics.get(name, 0) for name in SAMPLER_COUNTS}
    counts |= {f"sampler/{name}": found for name in FAILURE_COUNTS if (found := sampled.statistics.get(name, 0))}
    counts |= {
        f"sampler/{name}_response_tokens_mean": sampled.statistics.get(f"tokens_{name}", 0) / responses
        for name in DROPPED_COUNTS
        if (responses := sampled.statistics.get(f"responses_{name}", 0))
    }
    counts |= _sampled_metrics(sampled.statistics)
    if not sampled.records:
        return counts
    lengths = [length for record in sampled.records for length in record.response_tokens]
    ages = [step - record.oldest for record in sampled.records]
    low, median, high = np.quantile(lengths, (0.25, 0.5, 0.75)).tolist()
    return {
        "rollout/accuracy": _mean([a for record in sampled.records for a in record.accuracies if a is not None]),
        "rollout/reward": _mean([r for record in sampled.records for r in record.rewards if r is not None]),
        "rollout/response_tokens_min": min(lengths),
        "rollout/response_tokens_q25": low,
        "rollout/response_tokens_mean": _mean(lengths),
        "rollout/response_tokens_median": median,
        "rollout/response_tokens_q75": high,
        "rollout/response_tokens_max": max(lengths),
        "rollout/truncated_fraction": sum(record.truncated for record in sampled.records) / len(lengths),
        "rollout/groups": len(sampled.records),
        "rollout/staleness_mean": _mean(ages),
        "rollout/staleness_max": max(ages),
    } | counts


def _sampled_metrics(statistics: Mapping[str, int]) -> dict[str, float]:
    """Returns accuracy and length of all responses that the step completed, also of groups that were not kept."""
    found = {}
    if judged := statistics.get("responses_judged", 0):
        found["sampler/accuracy"] = statistics["responses_right"] / judged
    if responses := statistics.get("responses_sampled", 0):
        found["sampler/response_tokens_mean"] = statistics["response_tokens_sampled"] / responses
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def update_metrics(updates: Sequence[UpdateMetrics], *, sft: bool = False) -> dict[str, Any]:
    """Reduces the metrics of a step's updates: means of means, minima of minima, maxima of maxima.

    Args:
        updates: Metrics of each update.
        sft: Whether the metrics that compare policies or depend on an advantage are left out.
    """
    done = [update for update in updates if not update.skipped]
    found: dict[str, list[float]] = {"updates": [len(updates)], "skipped": [len(updates) - len(done)]}
    if done:
        found |= {
            "loss": [update.loss for update in done],
            "grad_norm": [update.grad_norm for update in done],
            "learning_rate": [done[-1].learning_rate],
        }
        names = sorted({name for update in done for name in update.statistics})
        found |= {name: [u.statistics[name] for u in done if name in u.statistics] for name in names}
        if "weight_min" in found:
            found["inert_updates"] = [
                float(u.statistics["weight_min"] == u.statistics["weight_max"] == 1.0) for u in done
            ]
    values = {}
    for name, per_update in found.items():
        if sft and OF_UPDATES[name].when:
            continue
        reduce = np.max if name.endswith("_max") else np.min if name.endswith("_min") else np.mean
        value = float(reduce(per_update))
        values[OF_UPDATES[name].tag] = value if math.isfinite(value) else None
    return values


def probe_metrics(shift: ProbeShift | None) -> dict[str, float]:
    """Returns the difference of engine and actor after the weights were sent; empty if no probe was sampled."""
    if shift is None:
        return {}
    return {"probe/abs_mean": shift.mean, "probe/abs_q90": shift.quantile, "probe/abs_max": shift.largest}


def noise_metrics(floor: NoiseFloor | None, values: Mapping[str, Any], *, fipo: bool) -> dict[str, float | None]:
    """Returns the noise floor and its ratio to the largest |d| and |F| of the step; empty if it was not measured."""
    if floor is None:
        return {}
    found = [("shift", floor.shift, values.get("policy/shift_abs_max"))]
    if fipo:
        found.append(("future_kl", floor.future_kl, values.get("future_kl/abs_max")))
    report: dict[str, float | None] = {}
    for name, noise, signal in found:
        known = math.isfinite(noise)
        report[f"noise/{name}"] = noise if known else None
        report[f"noise/{name}_ratio"] = noise / signal if known and signal else None
    return report
