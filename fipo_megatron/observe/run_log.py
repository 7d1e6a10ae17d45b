"""Writes the metrics of a run to its files, to trackers and to the console.

Each file has one JSON object per line with the tags of :mod:`.observe.metrics`. ``metrics.jsonl`` and
``evaluation.jsonl`` hold nothing that depends on time, so equal runs write equal files; ``timing.jsonl`` has the
seconds, and ``phases.jsonl`` those that belong to no step.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.algorithm.loss_statistics import bin_edges
from fipo_megatron.config import Config, as_dict
from fipo_megatron.evaluation.results import Evaluation, cut_problems, problems_file, write_problems
from fipo_megatron.observe.collapse_alarm import Alarm, HealthSample, needed_tags, sample_of
from fipo_megatron.observe.console import StepLines
from fipo_megatron.observe.trackers import Tracker, open_trackers
from fipo_megatron.observe.trajectory_files import TrajectoryFiles
from fipo_megatron.storage.atomic import write_atomic
from fipo_megatron.storage.json_lines import Check, cut_rows, is_number, is_regular, no_check, read_rows

if TYPE_CHECKING:
    from fipo_megatron.actor.update_metrics import UpdateMetrics
    from fipo_megatron.rollout.sampler import SampledGroups

logger = logging.getLogger(__name__)

_METRICS, _EVALUATION, _PHASES = "metrics.jsonl", "evaluation.jsonl", "phases.jsonl"
_ACCURACY = "evaluation/accuracy"
_MIB = 1 << 20
_LENGTH_BINS = 30


class RunLog:
    """Writes the metrics of a run. Every rank has one; only that of the first rank writes.

    Args:
        config: Configuration of the run.
        writes: Whether this rank writes.
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
        self._restarts = 0

    def open(self, first_step: int) -> None:
        """Removes the rows of ``first_step`` and later from the files, and opens the trackers."""
        self.cut(first_step)
        if self._writes:
            described = as_dict(self._config)
            is_regular(file := self._output / "config.yaml")  # anything else is set aside
            write_atomic(file, _as_yaml(described))
            self._trackers = open_trackers(self._config.observe, self._output, described, first_step)

    def close(self) -> None:
        """Flushes and closes the trackers."""
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
        """Writes the metrics of a step.

        Args:
            step: Number of the step.
            values: Metrics by tag.
            sampled: Groups of the step; None with ``algorithm.kind = sft``.
            updates: Metrics of the step's updates.
            kept: Rows for the trajectory file.
            shown: Rows that trackers show as text.
        """
        if not self._writes:
            return
        with self._observing():
            self._values = values
            self._append(_METRICS, {"step": step} | dict(values))
            self._report_scalars(step, values)
            self._report_histograms(step, sampled, updates)
            self._trajectories.append(step, kept)
            for tracker in self._trackers if shown else ():
                tracker.text(step, "samples/responses", shown)

    def timing(self, step: int, seconds: Mapping[str, float], rates: Mapping[str, float | None]) -> None:
        """Writes the times of a finished step, and its line on the console.

        Args:
            step: Number of the step.
            seconds: Seconds by part, and ``step`` for the whole.
            rates: Tags and values of :mod:`.observe.throughput`.
        """
        if not self._writes:
            return
        parts = dict(seconds) | {"observe": seconds.get("observe", 0.0) + self._seconds}
        self._seconds = 0.0
        with self._observing():  # counted in the next step
            rest = parts["step"] - sum(value for name, value in parts.items() if name not in ("step", "reward"))
            parts["idle"] = max(0.0, rest)
            values = {f"time/{name}": round(value, 4) for name, value in parts.items()} | dict(rates)
            values["run/restarts"] = self._restarts
            self._append("timing.jsonl", {"step": step} | values)
            self._report_scalars(step, values)
            shown = {name: parts[name] for name in parts if name not in ("idle", "observe", "reward")}
            self._lines.say(step, self._config.run.steps, self._values, shown)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Writes an evaluation of the weights at the beginning of a step."""
        if self._writes:
            values = found.scalars()
            write_problems(problems_file(self._output, step), found.problems)
            self._append(_EVALUATION, {"step": step} | values)
            self._report_scalars(step, values)
            text = "step %d: evaluation: accuracy %.3f, %.1f tokens per response"
            logger.info(text, step, found.accuracy, found.response_tokens)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Writes to ``phases.jsonl`` how long a block took that belongs to no step.

        Args:
            name: ``evaluate`` or ``export``; see also :meth:`started`.
            step: Number of the next step.
        """
        start = time.perf_counter()
        yield
        self._write_phase(name, step, time.perf_counter() - start)

    def started(self, step: int) -> None:
        """Writes to ``phases.jsonl`` the time from the start of this process to its first step."""
        if self._writes:
            self._restarts = sum(row.get("phase") == "start" for row in read_rows(self._output / _PHASES, no_check))
        self._write_phase("start", step, _process_seconds())

    def _write_phase(self, name: str, step: int, seconds: float) -> None:
        if self._writes:
            self._append(_PHASES, {"step": step, "phase": name, "seconds": round(seconds, 4)})
            logger.info("%s took %.1f s", name, seconds)

    def alarm(self, raised: Alarm, action: str) -> None:
        """Writes a collapse alarm and the reaction to it."""
        if self._writes:
            row = {"step": raised.step, "began": raised.began, "action": action, "reason": raised.reason}
            self._append("alarms.jsonl", row)

    def cut(self, step: int) -> None:
        """Removes the rows of ``step`` and later from all files; sets rows aside that cannot be used."""
        if self._writes:
            for name, check in FILES.items():
                kept = cut_rows(self._output / name, step, check=check, increasing=True)
                if name == _METRICS:
                    _warn_of_lost_rows(self._output / name, kept, step)
            cut_rows(self._output / _PHASES, math.inf)  # all passed, also of steps that are repeated
            self._trajectories.cut(step)
            cut_problems(self._output, step)

    def evaluations(self) -> dict[int, float]:
        """Returns the evaluation accuracy by step; empty on ranks that do not write."""
        rows = self._rows(_EVALUATION)
        return {row["step"]: row[_ACCURACY] for row in rows if row[_ACCURACY] is not None}

    def seen(self) -> list[HealthSample]:
        """Returns the samples of the collapse alarm since it was last off; empty on ranks that do not write."""
        found: list[HealthSample] = []
        for row in self._rows(_METRICS):
            sample = sample_of(row["step"], row)
            if "health/alarm" in row and sample is not None:
                found.append(sample)
            elif sample is not None:
                found.clear()
        return found

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return read_rows(self._output / name, FILES[name]) if self._writes else []

    def _report_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {tag: float(value) for tag, value in values.items() if value is not None and math.isfinite(value)}
        for tracker in self._trackers:
            tracker.scalars(step, finite)

    def _report_histograms(self, step: int, sampled: SampledGroups | None, updates: Sequence[UpdateMetrics]) -> None:
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


def _check_metrics(values: dict[str, Any]) -> str:
    """Returns why the alarm cannot use a row of ``metrics.jsonl``; an empty string if it can."""
    if "health/alarm" in values:
        for tag in needed_tags(values):
            if not is_number(values.get(tag)):
                return f"has no number {tag}"
    return ""


def _check_evaluation(values: dict[str, Any]) -> str:
    """Returns why a row of ``evaluation.jsonl`` has no accuracy; an empty string if it has one."""
    if _ACCURACY in values and (values[_ACCURACY] is None or is_number(values[_ACCURACY])):
        return ""
    return f"has no number {_ACCURACY}"


FILES: Mapping[str, Check] = {
    _METRICS: _check_metrics,
    _EVALUATION: _check_evaluation,
    "timing.jsonl": no_check,
    "alarms.jsonl": no_check,
}
"""Files with at most one row per step, and the check of their rows."""


def _warn_of_lost_rows(file: Path, kept: Sequence[int], step: int) -> None:
    """Warns of the steps before ``step`` without a row: the collapse alarm resumes from the rows."""
    lost = sorted(set(range(step)) - set(kept))
    if lost:
        shown = ", ".join(map(str, lost[:10])) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        logger.warning("%s: has no row of step %s; the collapse alarm resumes without them", file, shown)


def _process_seconds() -> float:
    """Returns the age of this process; the interpreter and its imports take seconds of it."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _as_yaml(described: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(described), sort_keys=False))
