"""What every step did, by the tags of :mod:`.observe.metrics`: one JSON object per line, and whatever else shows it.

``metrics.jsonl`` and ``evaluation.jsonl`` hold nothing that depends on time, so that equal runs have equal files;
``timing.jsonl`` has the seconds.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.algorithm.loss_statistics import bin_edges
from fipo_megatron.config import Config, as_dict
from fipo_megatron.evaluation.results import cut_problems, problems_file, write_problems
from fipo_megatron.observe.collapse_alarm import LOOKED_AT, Alarm, HealthSample
from fipo_megatron.observe.console import StepLines
from fipo_megatron.observe.metrics import OF_UPDATES, SAMPLER_COUNTS
from fipo_megatron.observe.trackers import Tracker, open_trackers
from fipo_megatron.observe.trajectory_files import TrajectoryFiles, cut_rows

if TYPE_CHECKING:
    from fipo_megatron.actor.update_metrics import NoiseFloor, UpdateMetrics
    from fipo_megatron.evaluation.results import Evaluation
    from fipo_megatron.rollout.sampler import SampledGroups

logger = logging.getLogger(__name__)

FILES = ("metrics.jsonl", "evaluation.jsonl", "timing.jsonl", "alarms.jsonl")
_MIB = 1 << 20
_LENGTH_BINS = 30


class RunLog:
    """Writes the files of a run, and tells trackers and people. On all ranks; the first writes.

    Args:
        config: Of the run.
        writes: Whether this rank does.
    """

    def __init__(self, config: Config, *, writes: bool) -> None:
        self._config, self._writes = config, writes
        self._output = Path(config.run.output)
        observe = config.observe
        self._trajectories = TrajectoryFiles(
            self._output / "trajectories",
            int(observe.trajectory_file_mib * _MIB),
            int(observe.trajectory_mib * _MIB),
        )
        self._trackers: list[Tracker] = []
        self._lines = StepLines()
        self._values: Mapping[str, Any] = {}
        self._seconds = 0.0

    def open(self, first_step: int) -> None:
        """Cuts off what was written of this step and later ones, and opens the trackers."""
        self.cut(first_step)
        if self._writes:
            described = as_dict(self._config)
            (self._output / "config.yaml").write_text(_as_yaml(described), encoding="utf-8")
            self._trackers = open_trackers(self._config.observe, self._output, described, first_step)

    def close(self) -> None:
        """Everything is written after this."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    @contextmanager
    def _observing(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    def step(
        self,
        step: int,
        values: Mapping[str, Any],
        sampled: SampledGroups | None,
        updates: Sequence[UpdateMetrics],
        kept: Sequence[Mapping[str, Any]],
        shown: Sequence[Mapping[str, Any]],
    ) -> None:
        """A step.

        Args:
            step: Its number.
            values: Its metrics by tag.
            sampled: What it learned from; None where that was examples.
            updates: What it did.
            kept: Rows of the trajectory file.
            shown: Those that trackers show as text.
        """
        if not self._writes:
            return
        with self._observing():
            self._values = values
            self._append("metrics.jsonl", {"step": step} | dict(values))
            self._tell(step, values)
            self._histograms(step, sampled, updates)
            self._trajectories.append(step, kept)
            for tracker in self._trackers if shown else ():
                tracker.text(step, "samples/responses", shown)

    def timing(self, step: int, seconds: Mapping[str, float], rates: Mapping[str, float | None]) -> None:
        """How long a step took, when it is over; and its line.

        Args:
            step: Its number.
            seconds: By part, and ``step``: the whole.
            rates: Tags and values of :mod:`.observe.throughput`.
        """
        if not self._writes:
            return
        parts = dict(seconds) | {"observe": seconds.get("observe", 0.0) + self._seconds}
        self._seconds = 0.0
        with self._observing():  # what this takes is found in the next step
            within = parts["step"] - sum(value for name, value in parts.items() if name not in ("step", "reward"))
            parts["idle"] = max(0.0, within)
            values = {f"time/{name}": round(value, 4) for name, value in parts.items()} | dict(rates)
            self._append("timing.jsonl", {"step": step} | values)
            self._tell(step, values)
            shown = {name: parts[name] for name in parts if name not in ("step", "idle", "observe", "reward")}
            self._lines.say(step, self._config.run.steps, self._values, shown)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """An evaluation, with the weights that the step begins with."""
        if self._writes:
            values = found.scalars()
            write_problems(problems_file(self._output, step), found.problems)
            self._append("evaluation.jsonl", {"step": step} | values)
            self._tell(step, values)
            text = "step %d: evaluation: accuracy %.3f, %.1f tokens per response"
            logger.info(text, step, found.accuracy, found.response_tokens)

    def alarm(self, raised: Alarm, action: str) -> None:
        """The alarm for collapse, and what follows."""
        if self._writes:
            row = {"step": raised.step, "began": raised.began, "action": action, "reason": raised.reason}
            self._append("alarms.jsonl", row)

    def cut(self, step: int) -> None:
        """Removes what was written of this step and later ones, and lines that are not whole."""
        if self._writes:
            for name in FILES:
                cut_rows(self._output / name, step)
            self._trajectories.cut(step)
            cut_problems(self._output, step)

    def evaluations(self) -> dict[int, float]:
        """Accuracy by step; on the first rank."""
        return {row["step"]: row["evaluation/accuracy"] for row in self._rows("evaluation.jsonl")}

    def seen(self) -> list[HealthSample]:
        """What the alarm for collapse has looked at since it was off; on the first rank."""
        found: list[HealthSample] = []
        for row in self._rows("metrics.jsonl"):
            if "health/alarm" in row:
                found.append((row["step"], *(row[tag] for tag in LOOKED_AT)))
            elif all(row.get(tag) is not None for tag in LOOKED_AT):
                found.clear()
        return found

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        file = self._output / name
        if self._writes and file.exists():
            yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())

    def _tell(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {tag: float(value) for tag, value in values.items() if value is not None and math.isfinite(value)}
        for tracker in self._trackers:
            tracker.scalars(step, finite)

    def _histograms(self, step: int, sampled: SampledGroups | None, updates: Sequence[UpdateMetrics]) -> None:
        found = []
        if sampled is not None and sampled.records:
            lengths = [length for record in sampled.records for length in record.response_tokens]
            counts, edges = np.histogram(lengths, bins=_LENGTH_BINS)
            found.append(("rollout/response_tokens", edges, counts))
            if updates:
                shifts = np.sum([update.shifts for update in updates], axis=0)
                for name, row in zip(("positive", "negative"), shifts, strict=True):
                    found.append((f"policy/log_ratio_{name}", bin_edges().numpy(), row))
        for tag, edges, counts in found:
            if counts.any():
                for tracker in self._trackers:
                    tracker.histogram(step, tag, edges, counts)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with (self._output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _as_yaml(described: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(described), sort_keys=False))


def rollout_metrics(sampled: SampledGroups | None, step: int) -> dict[str, Any]:
    """Of the groups that are trained on, and the sampler's counts; the same in whatever order the groups came."""
    if sampled is None:
        return {}
    counts = {f"sampler/{name}": sampled.statistics.get(name, 0) for name in SAMPLER_COUNTS}
    if not sampled.records:
        return counts
    lengths = [length for record in sampled.records for length in record.response_tokens]
    ages = [step - record.oldest for record in sampled.records]
    low, median, high = np.quantile(lengths, (0.25, 0.5, 0.75)).tolist()
    return {
        "rollout/accuracy": _mean([a for record in sampled.records for a in record.accuracies]),
        "rollout/reward": _mean([r for record in sampled.records for r in record.rewards]),
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


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def update_metrics(updates: Sequence[UpdateMetrics]) -> dict[str, Any]:
    """Means over the updates of a step, extremes of extremes."""
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
        reduce = np.max if name.endswith("_max") else np.min if name.endswith("_min") else np.mean
        value = float(reduce(per_update))
        values[OF_UPDATES[name].tag] = value if math.isfinite(value) else None
    return values


def noise_metrics(floor: NoiseFloor | None, values: Mapping[str, Any], *, fipo: bool) -> dict[str, float | None]:
    """The noise floor, beside the largest |d| and |F| of the step; nothing where it was not measured."""
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
