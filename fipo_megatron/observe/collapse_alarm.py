"""The collapse alarm.

Triggers if the medians of low-clip fraction and policy KL exceed their limits while length or accuracy falls below its
ratio, or if the median of policy KL alone exceeds ``health.policy_kl_limit``. Low-clip fraction, policy KL and length
are the signature of Fig. 2 of arXiv 2603.19835. Accuracy is added because a collapsed policy need not be terse: with
ten times its learning rate, the quickstart loses its accuracy at full length.

A policy that collapses at once leaves none of these signs, because nothing is learned from it any more. The alarm also
triggers after ``health.window`` lost steps in a row: steps without a kept group whose fraction of groups that are all
right is below the accuracy ratio, and steps whose updates were all skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fipo_megatron.config import HealthConfig

_LENGTH, _ACCURACY = "rollout/response_tokens_mean", "rollout/accuracy"
LOOKED_AT = ("policy/clip_fraction_low", "policy/policy_kl", _LENGTH, _ACCURACY)
_GROUPS = ("sampler/groups_all_right", "sampler/groups_all_wrong")


class CollapseError(RuntimeError):
    """The collapse alarm has ended the run; its state is saved."""


@dataclass(frozen=True)
class Alarm:
    """A collapse that was detected.

    Attributes:
        step: Step in which the alarm triggered.
        began: First step of its window. Alarms without a healthy window between them share that of the first.
        reason: The values and their limits.
    """

    step: int
    began: int
    reason: str


HealthSample = tuple[int, float | None, float | None, float | None, float]
"""A step and its values of ``LOOKED_AT``.

A step whose updates were all skipped has neither low-clip fraction nor policy KL. A step without a kept group has no
length either; its accuracy is the fraction of groups that are all right among those that are all right or all wrong.
"""


def needed_tags(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the tags that the alarm reads in the metrics of a step."""
    if "rollout/groups" not in values and values.get("sampler/groups_sampled"):
        return _GROUPS
    updates = values.get("optimizer/updates")
    return (_LENGTH, _ACCURACY) if updates and values.get("optimizer/skipped_updates") == updates else LOOKED_AT


def sample_of(step: int, values: Mapping[str, Any]) -> HealthSample | None:
    """Returns the sample of a step; None if its metrics say nothing about the policy."""
    tags = needed_tags(values)
    if any(values.get(tag) is None for tag in tags):
        return None
    if tags is _GROUPS:
        right, wrong = (float(values[tag]) for tag in _GROUPS)
        return (step, None, None, None, right / (right + wrong)) if right + wrong else None
    low_clip, policy_kl, length, accuracy = (float(values[tag]) if tag in tags else None for tag in LOOKED_AT)
    assert accuracy is not None
    return step, low_clip, policy_kl, length, accuracy


class CollapseAlarm:
    """Checks every training step. It depends only on the metrics, so a resumed run triggers it in the same step.

    Args:
        config: The limits.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._history: list[HealthSample] = []
        self._reset()

    def _reset(self) -> None:
        self._window: list[HealthSample] = []
        self._lost: list[HealthSample] = []
        self._began: int | None = None
        self._lengths: deque[float] = deque(maxlen=self._config.length_steps)
        self._best_accuracy = 0.0

    @property
    def safe(self) -> int | None:
        """Step up to which checkpoints precede the present collapse and any that a later alarm may report.

        None before the first sample, or if the alarm is off.
        """
        if self._config.action == "off":
            return None
        return self._window[0][0] if self._began is None and self._window else self._began

    def look(self, step: int, values: Mapping[str, Any]) -> tuple[dict[str, float], Alarm | None]:
        """Checks the metrics of a step.

        Returns:
            The metrics of the alarm, and the alarm if it triggers, which also clears the window. Empty and None if the
            metrics say nothing about the policy or the alarm is off.
        """
        sample = sample_of(step, values)
        if self._config.action == "off" or sample is None:
            return {}, None
        self._history.append(sample)
        return self._judge(sample)

    @property
    def history(self) -> Sequence[HealthSample]:
        """Samples of all steps so far, for :meth:`restore`."""
        return tuple(self._history)

    def restore(self, history: Iterable[HealthSample]) -> None:
        """Resets the alarm and replays the samples of earlier steps."""
        self._history = [(*one,) for one in history]
        self._reset()
        for sample in self._history:
            self._judge(sample)

    def _judge(self, sample: HealthSample) -> tuple[dict[str, float], Alarm | None]:
        if sample[1] is None:
            return self._judge_untrained(sample)
        config = self._config
        self._lost = []
        self._window = [*self._window, sample][-config.window :]
        low_clip, policy_kl, length, accuracy = (
            median(abs(one[n] or 0.0) for one in self._window) for n in range(1, 5)
        )
        self._lengths.append(length)
        best_length = max(self._lengths)
        self._best_accuracy = max(self._best_accuracy, accuracy)
        report = {
            "health/low_clip": low_clip,
            "health/policy_kl": policy_kl,
            "health/length_ratio": length / best_length if best_length else 1.0,
            "health/accuracy_ratio": accuracy / self._best_accuracy if self._best_accuracy else 1.0,
        }
        full = len(self._window) == config.window
        raised = full and self._is_collapse(report)
        report["health/alarm"] = float(raised)
        if not raised:
            self._began = None if full else self._began
            return report, None
        return report, self._raise(sample[0], self._window[0][0], self._reason(report))

    def _judge_untrained(self, sample: HealthSample) -> tuple[dict[str, float], Alarm | None]:
        """Judges a step that learned nothing. The updates before the first lost step may have caused it."""
        step, _, _, length, right = sample
        fell = self._best_accuracy > 0 and right <= self._config.accuracy_ratio * self._best_accuracy
        self._lost = [*self._lost, sample] if length is not None or fell else []
        raised = len(self._lost) == self._config.window
        report = {"health/lost_steps": float(len(self._lost)), "health/alarm": float(raised)}
        if not raised:
            return report, None
        before = self._window or self._lost
        return report, self._raise(step, before[0][0], self._reason_of_lost())

    def _raise(self, step: int, began: int, reason: str) -> Alarm:
        self._began = began if self._began is None else self._began
        self._window, self._lost = [], []
        return Alarm(step, self._began, reason)

    def _is_collapse(self, report: Mapping[str, float]) -> bool:
        config = self._config
        pushed = report["health/low_clip"] >= config.low_clip and report["health/policy_kl"] >= config.policy_kl
        fell = (
            report["health/length_ratio"] <= config.length_ratio
            or report["health/accuracy_ratio"] <= config.accuracy_ratio
        )
        return (pushed and fell) or report["health/policy_kl"] >= config.policy_kl_limit

    def _reason(self, report: Mapping[str, float]) -> str:
        config = self._config
        return (
            f"medians of {config.window} steps: low-clip fraction {report['health/low_clip']:.2%} (limit "
            f"{config.low_clip:.2%}), policy KL {report['health/policy_kl']:.3g} (limit {config.policy_kl:g}, alone "
            f"{config.policy_kl_limit:g}), length {report['health/length_ratio']:.0%} of its best in "
            f"{config.length_steps} steps (limit {config.length_ratio:.0%}), accuracy "
            f"{report['health/accuracy_ratio']:.0%} of its best (limit {config.accuracy_ratio:.0%})"
        )

    def _reason_of_lost(self) -> str:
        config, parts = self._config, []
        if empty := [one[4] for one in self._lost if one[3] is None]:
            parts.append(
                f"no group was kept in {len(empty)} of them, and at most {max(empty):.0%} of the groups were all right "
                f"(best accuracy before: {self._best_accuracy:.0%}, limit {config.accuracy_ratio:.0%} of it)"
            )
        if skipped := len(self._lost) - len(empty):
            parts.append(f"every update was skipped in {skipped} of them")
        return f"nothing was learned in the last {config.window} steps: {'; '.join(parts)}"
