"""The collapse alarm.

Triggers if the medians of low-clip fraction and policy KL exceed their limits while length or accuracy falls below its
ratio, or if the median of policy KL alone exceeds ``health.policy_kl_limit``. Low-clip fraction, policy KL and length
are the signature of Fig. 2 of arXiv 2603.19835. Accuracy is added because a collapsed policy need not be terse: with
ten times its learning rate, the quickstart loses its accuracy at full length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fipo_megatron.config import HealthConfig

LOOKED_AT = (
    *("policy/clip_fraction_low", "policy/policy_kl"),
    *("rollout/response_tokens_mean", "rollout/accuracy"),
)


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


HealthSample = tuple[int, float, float, float, float]
"""A step and its values of ``LOOKED_AT``."""


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
            step has not trained or the alarm is off.
        """
        if self._config.action == "off" or any(values.get(tag) is None for tag in LOOKED_AT):
            return {}, None
        low_clip, policy_kl, length, accuracy = (float(values[tag]) for tag in LOOKED_AT)
        sample = (step, low_clip, policy_kl, length, accuracy)
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
        config = self._config
        self._window = [*self._window, sample][-config.window :]
        low_clip, policy_kl, length, accuracy = (median(abs(one[n]) for one in self._window) for n in range(1, 5))
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
        self._began = self._window[0][0] if self._began is None else self._began
        self._window = []
        return report, Alarm(sample[0], self._began, self._reason(report))

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
