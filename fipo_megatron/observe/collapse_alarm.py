"""The alarm for collapse: many tokens clipped from below and a rising policy KL, while length or accuracy falls.

The first three are the signature of Fig. 2 of arXiv 2603.19835. A policy that was pushed too far need not become terse:
the quickstart at ten times its learning rate loses its accuracy at full length.
"""

from __future__ import annotations

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
    """The alarm has ended the run; what there was is saved."""


@dataclass(frozen=True)
class Alarm:
    """Why a run is taken for collapsed.

    Attributes:
        step: In which it was noticed.
        began: The first step of the window; of an alarm that follows another one without a sound window between them,
            that of the first.
        reason: The numbers and their bounds.
    """

    step: int
    began: int
    reason: str


HealthSample = tuple[int, float, float, float, float]
"""Step, and the values of ``LOOKED_AT``."""


class CollapseAlarm:
    """Looks at every step that learns. It depends on the metrics alone, so a resumed run raises it in the same step.

    Args:
        config: Its bounds.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._history: list[HealthSample] = []
        self._reset()

    def _reset(self) -> None:
        self._window: list[HealthSample] = []
        self._began: int | None = None
        self._longest = self._most_right = 0.0

    @property
    def safe(self) -> int | None:
        """A checkpoint of this step or an earlier one is from before whatever is, or comes to be, taken for a collapse.

        None: nothing has been looked at.
        """
        if self._config.action == "off":
            return None
        return self._window[0][0] if self._began is None and self._window else self._began

    def look(self, step: int, values: Mapping[str, Any]) -> tuple[dict[str, float], Alarm | None]:
        """The metrics of a step.

        Returns:
            What there is to report of it, and the alarm where it is raised; the window is empty then. Nothing, where
            the step has not learned.
        """
        found = [values.get(tag) for tag in LOOKED_AT]
        if self._config.action == "off" or any(value is None for value in found):
            return {}, None
        seen = (step, *map(float, found))  # type: ignore[arg-type]
        self._history.append(seen)  # type: ignore[arg-type]
        return self._judge(seen)  # type: ignore[arg-type]

    @property
    def history(self) -> Sequence[HealthSample]:
        """All that was looked at; for :meth:`restore`."""
        return tuple(self._history)

    def restore(self, history: Iterable[HealthSample]) -> None:
        """Begins anew with what was seen of earlier steps."""
        self._history = [(*one,) for one in history]
        self._reset()
        for seen in self._history:
            self._judge(seen)

    def _judge(self, seen: HealthSample) -> tuple[dict[str, float], Alarm | None]:
        config = self._config
        self._window = [*self._window, seen][-config.window :]
        low_clip, policy_kl, length, accuracy = (median(abs(one[n]) for one in self._window) for n in range(1, 5))
        self._longest, self._most_right = max(self._longest, length), max(self._most_right, accuracy)
        report = {
            "health/low_clip": low_clip,
            "health/policy_kl": policy_kl,
            "health/length_ratio": length / self._longest,
            "health/accuracy_ratio": accuracy / self._most_right if self._most_right else 1.0,
        }
        whole = len(self._window) == config.window
        raised = whole and self._is_collapse(report)
        report["health/alarm"] = float(raised)
        if not raised:
            self._began = None if whole else self._began
            return report, None
        self._began = self._window[0][0] if self._began is None else self._began
        self._window = []
        return report, Alarm(seen[0], self._began, self._reason(report))

    def _is_collapse(self, report: Mapping[str, float]) -> bool:
        config = self._config
        pushed = report["health/low_clip"] >= config.low_clip and report["health/policy_kl"] >= config.policy_kl
        falls = (
            report["health/length_ratio"] <= config.length_ratio
            or report["health/accuracy_ratio"] <= config.accuracy_ratio
        )
        return (pushed and falls) or report["health/policy_kl"] >= config.policy_kl_limit

    def _reason(self, report: Mapping[str, float]) -> str:
        config = self._config
        return (
            f"by the median of {config.window} steps, {report['health/low_clip']:.2%} of the tokens are clipped from "
            f"below (bound {config.low_clip:.2%}), the policy KL is {report['health/policy_kl']:.3g} (bound "
            f"{config.policy_kl:g}, alone {config.policy_kl_limit:g}), the length is "
            f"{report['health/length_ratio']:.0%} of its best (bound {config.length_ratio:.0%}) and the accuracy "
            f"{report['health/accuracy_ratio']:.0%} (bound {config.accuracy_ratio:.0%})"
        )
