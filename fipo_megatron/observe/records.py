"""What every step did, one JSON object per line: ``metrics.jsonl``, and how long it took: ``timing.jsonl``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.evaluation.results import cut_problems, problems_file, write_problems

if TYPE_CHECKING:
    from fipo_megatron.actor.actor import UpdateMetrics
    from fipo_megatron.evaluation.results import Evaluation
    from fipo_megatron.rollout.sampler import Sampled

logger = logging.getLogger(__name__)


FILES = ("metrics.jsonl", "evaluation.jsonl", "timing.jsonl")


class StepLog:
    """Writes the files of a run and a line for people.

    Args:
        output: Of the run.
        writes: Whether this rank does.
    """

    def __init__(self, output: Path, *, writes: bool) -> None:
        self._output, self._writes = output, writes

    def step(
        self, step: int, sampled: Sampled | None, updates: Sequence[UpdateMetrics], seconds: Mapping[str, float]
    ) -> None:
        """A step: what was sampled, and every update."""
        if not self._writes:
            return
        values = rollout_metrics(sampled, step) | update_metrics(updates)
        self._append("metrics.jsonl", {"step": step} | values)
        self._append("timing.jsonl", {"step": step} | {name: round(value, 4) for name, value in seconds.items()})
        shown = ("accuracy", "reward", "response_length", "loss", "grad_norm", "policy_kl", "weight_mean", "entropy")
        text = "  ".join(f"{name} {values[name]:.4g}" for name in shown if values.get(name) is not None)
        logger.info("step %4d  %s  (%s)", step, text, "  ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))

    def evaluation(self, step: int, found: Evaluation) -> None:
        """An evaluation, with the weights that the step begins with."""
        if self._writes:
            write_problems(problems_file(self._output, step), found.problems)
            self._append("evaluation.jsonl", {"step": step} | found.scalars())
            text = "step %4d  evaluation: accuracy %.3f  response_tokens %.1f"
            logger.info(text, step, found.accuracy, found.response_tokens)

    def cut(self, step: int) -> None:
        """Removes what was written of this step and later ones, and a line that is not whole."""
        if not self._writes:
            return
        for name in FILES:
            file = self._output / name
            if not file.exists():
                continue
            kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if _before(line, step)]
            partial = file.with_name(f".{name}.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(file)
        cut_problems(self._output, step)

    def evaluations(self) -> dict[int, float]:
        """Accuracy by step."""
        file = self._output / "evaluation.jsonl"
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
        return {row["step"]: row["evaluation/accuracy"] for row in rows}

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with (self._output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def rollout_metrics(sampled: Sampled | None, step: int) -> dict[str, Any]:
    """Of the groups that are trained on, and the sampler's counts; the same in whatever order the groups came."""
    if sampled is None or not sampled.records:
        return dict(sampled.statistics) if sampled is not None else {}
    lengths = [length for record in sampled.records for length in record.response_tokens]
    ages = [step - record.oldest for record in sampled.records]
    return {
        "accuracy": _mean([a for record in sampled.records for a in record.accuracies]),
        "reward": _mean([r for record in sampled.records for r in record.rewards]),
        "response_length": _mean(lengths),
        "response_length_max": max(lengths),
        "staleness": _mean(ages),
        "staleness_max": max(ages),
        "groups": len(sampled.records),
        "sampler": dict(sorted(sampled.statistics.items())),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def update_metrics(updates: Sequence[UpdateMetrics]) -> dict[str, Any]:
    """Means over the updates of a step, extremes of extremes."""
    done = [update for update in updates if not update.skipped]
    values: dict[str, Any] = {"updates": len(updates), "skipped": len(updates) - len(done)}
    if not done:
        return values
    values["loss"] = float(np.mean([update.loss for update in done]))
    values["grad_norm"] = float(np.mean([update.grad_norm for update in done]))
    values["learning_rate"] = done[-1].learning_rate
    for name in done[0].statistics:
        found = np.array([update.statistics[name] for update in done if name in update.statistics])
        reduce = np.max if name.endswith("_max") else np.min if name.endswith("_min") else np.mean
        value = float(reduce(found))
        values[name] = value if math.isfinite(value) else None
    return values


def _before(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) < step
    except (ValueError, KeyError):
        return False
