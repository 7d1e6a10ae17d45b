"""The results of an amplification: a row for each γ and threshold, and the choice of both on one half of the problems.

Differences of accuracy are paired: the interval is that of the mean difference per problem. Problems without a checked
response in one of the compared runs are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fipo_megatron.evaluation.amplify_runs import TOLERANCE, Run, Setting, matches
from fipo_megatron.evaluation.estimates import LEVEL, Estimate, estimate
from fipo_megatron.evaluation.evaluation_summary import aligned, percent


@dataclass(frozen=True)
class Amplified:
    """The runs of a setting.

    Attributes:
        setting: γ and threshold.
        run: The amplified run.
        control: RL alone at the temperature that matches the entropy of ``run``.
    """

    setting: Setting
    run: Run
    control: Run

    @property
    def matched(self) -> bool:
        """Whether the control has the entropy of the amplified run."""
        return matches(self.control, self.run.entropy)


@dataclass(frozen=True)
class Comparison:
    """Accuracies on some of the problems, with intervals.

    Attributes:
        rl: Accuracy of RL alone.
        amplified: Accuracy of the amplified run.
        control: Accuracy of its control.
        over_rl: Mean difference of the amplified run and RL alone.
        over_control: Mean difference of the amplified run and its control.
    """

    rl: Estimate
    amplified: Estimate
    control: Estimate
    over_rl: Estimate
    over_control: Estimate

    @classmethod
    def of(cls, alone: Run, one: Amplified, numbers: Sequence[int]) -> Comparison:
        """Compares the runs on the problems with these numbers."""
        rows = ([run.problems[i] for run in (alone, one.run, one.control)] for i in numbers)
        shares = [[row.right / row.checked for row in three] for three in rows if all(row.checked for row in three)]
        if not shares:
            return cls(*[Estimate(None)] * 5)
        rl, amplified, control = (list(column) for column in zip(*shares, strict=True))
        over_rl, over_control = ([a - b for a, b in zip(amplified, other, strict=True)] for other in (rl, control))
        return cls(*estimate([rl, amplified, control, over_rl, over_control]))


@dataclass(frozen=True)
class Amplification:
    """The result.

    Attributes:
        alone: RL alone.
        amplified: Every setting with its control.
    """

    alone: Run
    amplified: Sequence[Amplified]

    def half(self, second: bool) -> range:
        """Returns the numbers of the problems of a half: the first, third, fifth, … or the others."""
        return range(int(second), len(self.alone.problems), 2)

    def chosen(self) -> Amplified:
        """Returns the setting with the highest accuracy on the first half; the first one of several."""

        def accuracy(one: Amplified) -> float:
            value = Comparison.of(self.alone, one, self.half(False)).amplified.value
            return -1.0 if value is None else value

        return max(self.amplified, key=accuracy)

    def compare(self, one: Amplified, numbers: Sequence[int] | None = None) -> Comparison:
        """Compares a setting with RL alone and its control on all problems, or those with these numbers."""
        return Comparison.of(self.alone, one, range(len(self.alone.problems)) if numbers is None else numbers)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of ``amplify.json``."""
        chosen = self.chosen()
        halves = {"chosen_on": self.half(False), "reported_on": self.half(True)}
        return {
            "interval": LEVEL,
            "problems": len(self.alone.problems),
            "rl": _run_values(self.alone) | {"entropies": self.alone.means.entropies},
            "settings": [self._setting_values(one) for one in self.amplified],
            "choice": {
                **asdict(chosen.setting),
                **{
                    name: {"problems": len(numbers), "accuracy": asdict(self.compare(chosen, numbers))}
                    for name, numbers in halves.items()
                },
            },
        }

    def _setting_values(self, one: Amplified) -> dict[str, Any]:
        return {
            **asdict(one.setting),
            "amplified": _run_values(one.run),
            "control": _run_values(one.control) | {"matched": one.matched},
            "accuracy": asdict(self.compare(one)),
        }

    def table(self) -> str:
        """Formats a row per setting, and the choice."""
        heads = ["γ", "threshold", "accuracy", "− RL", "− control", "amplified", "changed", "tokens", "entropy"]
        heads += ["control: T", "entropy"]
        share = estimate([[row.right / row.checked for row in self.alone.problems if row.checked]])
        first = ["0", "–", percent(share[0]), "", "", "", "", f"{self.alone.response_tokens:.1f}"]
        rows = [[*first, f"{self.alone.entropy:.3f}", "", ""], *map(self._cells, self.amplified)]
        return f"{aligned([heads, *rows])}\n\n{_NOTE}\n\n{self._choice()}"

    def _cells(self, one: Amplified) -> list[str]:
        found, means = self.compare(one), one.run.means
        threshold = one.setting.threshold
        return [
            f"{one.setting.gamma:g}",
            "none" if threshold is None else f"{threshold:g}",
            percent(found.amplified),
            points(found.over_rl),
            points(found.over_control),
            f"{means.selected / means.tokens:.1%}",
            f"{means.changed / means.tokens:.1%}",
            f"{one.run.response_tokens:.1f}",
            f"{one.run.entropy:.3f}",
            f"{one.control.means.temperature:g}{'' if one.matched else '*'}",
            f"{one.control.entropy:.3f}",
        ]

    def _choice(self) -> str:
        chosen = self.chosen()
        on, reported = (self.compare(chosen, self.half(second)) for second in (False, True))
        return (
            f"Chosen on {len(self.half(False))} problems (every other one): {chosen.setting}, with "
            f"{percent(on.amplified)} against {percent(on.rl)} of RL alone.\nOn the other {len(self.half(True))}: "
            f"{percent(reported.amplified)} against {percent(reported.rl)}; points more than RL alone: "
            f"{points(reported.over_rl)}, than its control: {points(reported.over_control)}."
        )


_NOTE = f"""\
Accuracy over all problems; differences in points. In brackets: {LEVEL:.0%} bootstrap intervals over problems, paired.
Amplified, changed: share of tokens. Entropy: mean per token of the distribution drawn from, in nats. Control: RL alone
at the temperature T at which it has the same entropy (*: not within {TOLERANCE:.0%}). The best of many rows is
flattered by chance; γ and threshold are therefore chosen on one half of the problems and reported on the other."""


def points(difference: Estimate) -> str:
    """Formats a difference in percentage points, with its interval in brackets."""
    if difference.value is None:
        return "–"
    value = f"{100 * difference.value:+.1f}"
    if difference.low is None or difference.high is None:
        return value
    return f"{value} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _run_values(run: Run) -> dict[str, Any]:
    means = run.means
    return {
        "temperature": means.temperature,
        "response_tokens": run.response_tokens,
        "entropy": run.entropy,
        "selected_fraction": means.selected / means.tokens,
        "changed_fraction": means.changed / means.tokens,
    }
