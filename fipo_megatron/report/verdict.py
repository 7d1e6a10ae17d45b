"""The verdict: which run is better and why, judged by confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fipo_megatron.report.runs import Run, Series
from fipo_megatron.report.series import smoothed

ALL = "all data sets"
"""Name of the accuracy over all data sets, which has no interval."""

LAST_STEPS = 10
"""Number of last steps that final numbers are averaged over."""

_FALLS = (("rollout/accuracy", "training accuracy", 0.1, True), ("rollout/reward", "training reward", 0.2, False))
"""Tag, name, smallest drop that counts as a fall, and whether the value is a fraction."""

_SIGNALS = (
    ("policy/policy_kl", "policy KL", 1e-6),
    ("optimizer/grad_norm", "the gradient norm", 1e-9),
    ("policy/clip_fraction_low", "the low-clip fraction", 1e-4),
    ("policy/entropy", "entropy", 1e-9),
    ("rollout/response_tokens_mean", "response length", 1e-9),
)
"""Signals reported beside a fall: tag, name, and a floor below which values count as zero."""


@dataclass(frozen=True)
class Score:
    """A held-out accuracy at a step with its 95 % interval; NaN without an interval."""

    step: int
    value: float
    low: float
    high: float

    def below(self, other: Score) -> bool:
        """Returns whether the whole interval lies below that of ``other``."""
        return self.high < other.low

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({100 * self.low:.1f}–{100 * self.high:.1f})"
        return f"{100 * self.value:.1f} %{interval}"


@dataclass(frozen=True)
class Fall:
    """An accuracy or a reward that ends well below its best.

    Attributes:
        what: Name of the value.
        begin: Best value as text.
        end: Last value as text.
        best_step: Step of the best value.
        step: First step of the fall.
        beside: Other changes at the same time as text.
    """

    what: str
    begin: str
    end: str
    best_step: int
    step: int
    beside: str

    def __str__(self) -> str:
        return f"{self.what} fell from step {self.step}, from {self.begin} to {self.end}{self.beside}"


def scores(run: Run) -> dict[str, list[Score]]:
    """Returns the held-out accuracies by data set in the order of steps; of all together if none is named."""
    names = run.data_sets
    found = {name: _scores(run, f"evaluation/{name}/avg") for name in names}
    return found if names else {ALL: _scores(run, "evaluation/accuracy")}


def _scores(run: Run, tag: str) -> list[Score]:
    low, high = run.get(f"{tag}_low"), run.get(f"{tag}_high")
    series = run.get(tag).finite()
    return [
        Score(int(step), float(value), low.at(int(step)), high.at(int(step)))
        for step, value in zip(series.steps, series.values, strict=True)
    ]


def last_mean(series: Series, steps: int = LAST_STEPS) -> float:
    """Returns the mean of the last ``steps`` finite values; NaN without any."""
    values = series.finite().values[-steps:]
    return float(values.mean()) if len(values) else float("nan")


def held_out_fall(run: Run) -> Fall | None:
    """Returns the fall of the first data set whose last interval lies below its best one; None without a fall."""
    for name, found in scores(run).items():
        if not found:
            continue
        best, last = max(found, key=lambda score: score.value), found[-1]
        if last.below(best):
            after = [score.step for score in found if score.step > best.step and score.below(best)]
            what = "held-out accuracy" + ("" if len(scores(run)) == 1 else f" on {name}")
            return Fall(what, str(best), str(last), best.step, after[0], _beside(run, best.step, after[0]))
    return None


def training_fall(run: Run) -> Fall | None:
    """Returns a fall of training accuracy or reward that exceeds its noise; None without a fall."""
    for tag, name, least, share in _FALLS:
        series = run.get(tag).finite()
        window = _window(len(series))
        if len(series) < 2 * window:
            continue
        means = smoothed(series, window)
        best = int(np.argmax(means[window // 2 :])) + window // 2
        drop = float(means[best] - series.values[-window:].mean())
        noise = float(np.std(np.diff(series.values))) / math.sqrt(2 * window)
        if drop > max(least, 5 * noise):
            still = np.flatnonzero(means[best:] >= means[best] - max(drop / 10, 3 * noise))
            start = min(best + int(still[-1]) + 1, len(series) - 1)
            begin, end = float(means[best]), float(series.values[-window:].mean())
            step, best_step = int(series.steps[start]), int(series.steps[best])
            text = (f"{100 * begin:.1f} %", f"{100 * end:.1f} %") if share else (f"{begin:.3g}", f"{end:.3g}")
            return Fall(name, *text, best_step, step, _beside(run, best_step, step))
    return None


def _window(steps: int) -> int:
    return min(200, max(5, steps // 20))


def _beside(run: Run, before: int, after: int) -> str:
    """Describes signals that changed at least twofold between the steps before ``before`` and from ``after`` on."""
    changes = []
    for tag, name, floor in _SIGNALS:
        series = run.get(tag).finite()
        window = _window(len(series))
        first = np.abs(series.values[series.steps < before][-2 * window :])
        then = np.abs(series.values[series.steps >= after])
        if len(first) and len(then):
            ratio = float((then.mean() + floor) / (first.mean() + floor))
            word = f"rose ×{ratio:.2g}" if ratio > 1 else f"fell to {100 * ratio:.0f} %"
            changes.append((abs(math.log(ratio)), f"{name} {word}"))
    told = [text for size, text in sorted(changes, reverse=True) if size >= math.log(2)][:2]
    return f", while {' and '.join(told)}" if told else ""


def collapse(run: Run) -> Fall | None:
    """Returns the fall of a run: of held-out accuracy if there is one, otherwise of training; None without a fall.

    A fall in training that a later evaluation does not share does not count: dynamic sampling changes which prompts are
    trained on.
    """
    held, training = held_out_fall(run), training_fall(run)
    if held and training and training.step <= held.step:
        return Fall(held.what, held.begin, held.end, held.best_step, training.step, training.beside)
    evaluated = max((found[-1].step for found in scores(run).values() if found), default=-1)
    return held or (training if training and evaluated <= training.step else None)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        leader: Index of the run with the highest held-out accuracy; None if the runs cannot be compared.
        equals: Indices of the runs that are not clearly worse than the leader, including the leader.
        sentences: Sentences of the verdict, the most important one first.
    """

    leader: int | None
    equals: tuple[int, ...]
    sentences: list[str]


def compare(runs: list[Run]) -> Comparison:
    """Compares held-out accuracy at the last step that all runs evaluated; only disjoint intervals differ."""
    if len(runs) == 1:
        return Comparison(None, (0,), [_alone(runs[0]), *_troubles(runs)])
    tables = [scores(run) for run in runs]
    sets = [name for name in tables[0] if all(table.get(name) for table in tables)]
    common: dict[str, int] = {}
    for name in sets:
        steps = set.intersection(*({score.step for score in table[name]} for table in tables))
        if steps:
            common[name] = max(steps)
    if not common:
        text = "No comparison: the runs have no held-out evaluation at a common step."
        return Comparison(None, (), [text, *_troubles(runs)])
    at = [{name: _at(table[name], step) for name, step in common.items()} for table in tables]
    means = [sum(score.value for score in found.values()) / len(found) for found in at]
    leader = int(np.argmax(means))
    equals = tuple(i for i in range(len(runs)) if i == leader or not _clearly_below(at[i], at[leader]))
    behind = [_behind(runs[i], runs[leader], at[i], at[leader]) for i in range(len(runs)) if i not in equals]
    told = {runs[i].name for i in range(len(runs)) if i not in equals}
    sentences = [*_first(runs, at, leader, equals), *behind, *_troubles(runs, told)]
    uneven = {table[name][-1].step for table in tables for name in common} != set(common.values())
    if uneven:
        where = " and ".join(str(step) for step in sorted(set(common.values())))
        sentences.append(
            f"Compared at step {where}, the last one at which all were evaluated: the runs differ in length."
        )
    return Comparison(leader, equals, sentences)


def _at(found: list[Score], step: int) -> Score:
    return next(score for score in found if score.step == step)


def _clearly_below(found: dict[str, Score], best: dict[str, Score]) -> bool:
    """Returns whether ``found`` is below ``best`` on at least one data set and above on none."""
    return any(found[name].below(best[name]) for name in best) and not any(best[n].below(found[n]) for n in best)


def _first(runs: list[Run], at: list[dict[str, Score]], leader: int, equals: tuple[int, ...]) -> list[str]:
    where = " and ".join(str(step) for step in sorted({score.step for score in at[leader].values()}))
    values = ", ".join(f"{score}{'' if len(at[leader]) == 1 else f' on {name}'}" for name, score in at[leader].items())
    if len(equals) == 1:
        return [f"{runs[leader].name} is best: {values} of the held-out answers are right at step {where}."]
    *names, last = (runs[i].name for i in equals)
    known = not any(math.isnan(score.low) for i in equals for score in at[i].values())
    why = "their 95 % intervals overlap" if known else "there are no intervals to judge by"
    (name, *more) = at[leader]
    told = "" if more or len(equals) > 2 else f" ({', '.join(f'{runs[i].name} {at[i][name]}' for i in equals)})"
    return [f"No clear difference between {', '.join(names)} and {last} at step {where}: {why}{told}."]


def _behind(run: Run, best: Run, found: dict[str, Score], top: dict[str, Score]) -> str:
    clear = [name for name in top if found[name].below(top[name])]
    gaps = [
        f"{100 * (top[name].value - found[name].value):.1f} points{'' if len(top) == 1 else f' on {name}'}"
        for name in clear
    ]
    fall = collapse(run)
    return f"{run.name} is {', '.join(gaps)} below {best.name}" + (f"; its {fall}." if fall else ".")


def _alone(run: Run) -> str:
    told = []
    for name, found in scores(run).items():
        if found:
            first, last, of = found[0], found[-1], "" if len(scores(run)) == 1 else f" on {name}"
            text = f"{run.name}{of}: {last} of the held-out answers are right at step {last.step}"
            told.append(text + (f"; {_since(first, last)}." if len(found) > 1 else "."))
    return " ".join(told) or f"{run.name}: no held-out evaluation yet."


def _since(first: Score, last: Score) -> str:
    if math.isnan(first.low) or math.isnan(last.low):
        return f"{first} at step {first.step} (there are no intervals)"
    clear = "clearly more than" if first.below(last) else "clearly fewer than" if last.below(first) else ""
    return f"{clear or 'not clearly more or fewer than'} {first} at step {first.step}"


def _troubles(runs: list[Run], told: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Returns sentences about falls that are not in ``told``, and about first alarms."""
    sentences = []
    for run in runs:
        fall = collapse(run)
        if fall and run.name not in told:
            sentences.append(f"{run.name}: {fall}.")
        if run.alarms:
            alarm = run.alarms[0]
            more = f" ({len(run.alarms)} alarms in all)" if len(run.alarms) > 1 else ""
            sentences.append(f"{run.name}: alarm at step {alarm.step} ({alarm.action}): {alarm.reason}{more}.")
    return sentences
