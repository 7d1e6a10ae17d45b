"""The alarm for collapse: many tokens clipped from below, rising policy KL, falling length (2603.19835, Fig. 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fipo_megatron.config import HealthConfig

LOOKED_AT = ("policy/clip_fraction_low", "policy/policy_kl", "rollout/response_tokens_mean")


class CollapseError(RuntimeError):
    """The alarm has ended the run; what there was is saved."""


@dataclass(frozen=True)
class Alarm:
    """Why a run is taken for collapsed.

    Attributes:
        step: In which it was noticed.
        began: The first step of the window.
        reason: The numbers and their bounds.
    """

    step: int
    began: int
    reason: str


Seen = tuple[int, float, float, float]
"""Step, and the values of ``LOOKED_AT``."""


class CollapseAlarm:
    """Looks at every step that learns. It depends on the metrics alone, so a resumed run raises it in the same step.

    Args:
        config: Its bounds.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._history: list[Seen] = []
        self._window: list[Seen] = []
        self._longest = 0.0

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
    def history(self) -> Sequence[Seen]:
        """All that was looked at; for :meth:`restore`."""
        return tuple(self._history)

    def restore(self, history: Iterable[Seen]) -> None:
        """Begins anew with what was seen of earlier steps."""
        self._history, self._window, self._longest = [(*one,) for one in history], [], 0.0
        for seen in self._history:
            self._judge(seen)

    def _judge(self, seen: Seen) -> tuple[dict[str, float], Alarm | None]:
        config = self._config
        self._window = [*self._window[-config.window + 1 :], seen] if config.window > 1 else [seen]
        count = len(self._window)
        low_clip, policy_kl, length = (median(one[n] for one in self._window) for n in (1, 2, 3))
        self._longest = max(self._longest, length)
        ratio = length / self._longest
        signature = low_clip >= config.low_clip and abs(policy_kl) >= config.policy_kl and ratio <= config.length_ratio
        raised = count == config.window and (signature or abs(policy_kl) >= config.policy_kl_limit)
        report = {
            "health/low_clip": low_clip,
            "health/policy_kl": abs(policy_kl),
            "health/length_ratio": ratio,
            "health/alarm": float(raised),
        }
        if not raised:
            return report, None
        limit = "" if signature else f" (bound alone: {config.policy_kl_limit:g})"
        reason = (
            f"by the median of {count} steps, {low_clip:.2%} of the tokens are clipped from below "
            f"(bound {config.low_clip:.2%}), the policy KL is {abs(policy_kl):.3g} (bound {config.policy_kl:g}{limit}), "
            f"and the length is {ratio:.0%} of its best (bound {config.length_ratio:.0%})"
        )
        alarm = Alarm(seen[0], self._window[0][0], reason)
        self._window = []
        return report, alarm
