"""Rates of Oops and Aha with 95 % Wilson intervals and their denominators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fipo_megatron.evaluation.estimates import wilson
from fipo_megatron.moments.transitions import TRANSITIONS, JudgedResponse, ResponseMoments

COUNTS = ("responses", "answered", "several", "first_wrong", "final_wrong", "oops", "oops_strict", "aha", "aha_strict")
"""Counts of a set of responses. ``answered`` have a candidate; ``several``, and all that follow, have at least two."""

RATES: Mapping[str, tuple[str, ...]] = {
    "oops": ("responses", "several", "final_wrong"),
    "oops_strict": ("responses", "several", "final_wrong"),
    "aha": ("responses", "several", "first_wrong"),
    "aha_strict": ("responses", "several", "first_wrong"),
}
"""Denominators of each rate."""


@dataclass
class MomentCounts:
    """Counts over responses.

    Attributes:
        counts: :data:`COUNTS` by name.
        transitions: Responses of each transition.
        after_right: Sum of the tokens after the first right candidate.
        right: Number of responses in that sum.
    """

    counts: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    after_right: float = 0.0
    right: int = 0

    def add(self, moments: ResponseMoments, tokens_after_right: float | None = None) -> None:
        """Counts a response."""
        self.counts["responses"] += 1
        self.counts["answered"] += bool(moments.right)
        if tokens_after_right is not None:
            self.after_right += tokens_after_right
            self.right += 1
        if (transition := moments.transition) is None:
            return
        self.transitions[transition] += 1
        self.counts["several"] += 1
        self.counts["first_wrong"] += not moments.right[0]
        self.counts["final_wrong"] += not moments.right[-1]
        for name, found in (("oops", moments.oops), ("aha", moments.aha)):
            self.counts[name] += found
            self.counts[f"{name}_strict"] += found and moments.strict

    def merge(self, other: MomentCounts) -> None:
        """Adds the counts of other responses."""
        self.counts.update(other.counts)
        self.transitions.update(other.transitions)
        self.after_right += other.after_right
        self.right += other.right

    def as_dict(self) -> dict[str, Any]:
        """Returns counts, transitions and rates for a JSON file."""
        rates = {
            name: {of: rate(self.counts[name], self.counts[of]) for of in denominators}
            for name, denominators in RATES.items()
        }
        return {
            "counts": {name: self.counts[name] for name in COUNTS},
            "transitions": {name: self.transitions[name] for name in TRANSITIONS},
            "rates": rates,
            "tokens_after_first_right_mean": self.after_right / self.right if self.right else None,
        }


def rate(count: int, total: int) -> dict[str, Any]:
    """Returns count, denominator, fraction and its interval; null for 0 of 0."""
    low, high = wilson(count, total) if total else (None, None)
    return {"count": count, "of": total, "rate": count / total if total else None, "low": low, "high": high}


@dataclass
class MomentSummary:
    """The counts of a set of files.

    Attributes:
        complete: Counts of responses that ended by themselves.
        truncated: Counts of responses that were cut off at the length limit.
        by_step: Counts of complete responses, by step.
        failed: Responses of which a check failed.
        disagreements: Responses whose recorded verdict differs from that of their last candidate.
        recorded: Responses with a recorded verdict.
    """

    complete: MomentCounts = field(default_factory=MomentCounts)
    truncated: MomentCounts = field(default_factory=MomentCounts)
    by_step: dict[int, MomentCounts] = field(default_factory=dict)
    failed: int = 0
    disagreements: int = 0
    recorded: int = 0

    @classmethod
    def of(cls, responses: Iterable[JudgedResponse]) -> MomentSummary:
        """Counts responses."""
        found = cls()
        for response in responses:
            found.add(response)
        return found

    def add(self, response: JudgedResponse) -> None:
        """Counts a response."""
        moments = response.moments
        if moments is None:
            self.failed += 1
            return
        if response.truncated:
            self.truncated.add(moments, response.tokens_after_right)
            return
        self.complete.add(moments, response.tokens_after_right)
        if response.step is not None:
            self.by_step.setdefault(response.step, MomentCounts()).add(moments, response.tokens_after_right)
        if response.accuracy is not None:
            self.recorded += 1
            self.disagreements += bool(moments.right and moments.right[-1]) != bool(response.accuracy)

    def as_dict(self) -> dict[str, Any]:
        """Returns ``moments.json`` without settings and excerpts."""
        return {
            "complete": self.complete.as_dict(),
            "truncated": self.truncated.as_dict(),
            "by_step": {str(step): self.by_step[step].as_dict() for step in sorted(self.by_step)},
            "failed_checks": self.failed,
            "last_candidate_differs_from_recorded_verdict": {"count": self.disagreements, "of": self.recorded},
        }


def text_table(summary: MomentSummary, steps: int = 10) -> str:
    """Formats the counts for the terminal; of many steps, evenly spaced ones."""
    parts = [_section("complete responses", summary.complete), _section("truncated responses", summary.truncated)]
    shown = sorted(summary.by_step)
    if len(shown) > 1:
        picked = (
            shown if len(shown) <= steps else [shown[round(i * (len(shown) - 1) / (steps - 1))] for i in range(steps)]
        )
        lines = [f"  step {step:>6}: {_rates_line(summary.by_step[step].counts)}" for step in picked]
        parts.append("\n".join([f"by step ({len(picked)} of {len(shown)} steps)", *lines]))
    if summary.failed:
        parts.append(f"{summary.failed} responses whose check failed are left out")
    if summary.disagreements:
        parts.append(
            f"the last candidate has another verdict than the whole response in {summary.disagreements} of "
            f"{summary.recorded} responses"
        )
    return "\n\n".join(parts)


def _section(title: str, counts: MomentCounts) -> str:
    found = counts.counts
    lines = [
        f"{title}: {found['responses']}; with a candidate {found['answered']}, with at least two {found['several']}",
        "  first → last   " + "   ".join(f"{name} {counts.transitions[name]}" for name in TRANSITIONS),
    ]
    for name, denominators in RATES.items():
        shares = ", ".join(f"{_share(found[name], found[of])} of {found[of]} {_NAMES[of]}" for of in denominators)
        lines.append(f"  {name.replace('_', ' '):<12} {found[name]}: {shares}")
    if counts.right:
        lines.append(f"  tokens after the first right candidate: {counts.after_right / counts.right:.1f} on average")
    return "\n".join(lines)


_NAMES = {
    "responses": "(all)",
    "several": "(with two candidates)",
    "first_wrong": "(first wrong)",
    "final_wrong": "(last wrong)",
}


def _rates_line(counts: Mapping[str, int]) -> str:
    of = counts["responses"], counts["several"]
    return f"Oops {counts['oops']}, Aha {counts['aha']} of {of[1]} with two candidates, of {of[0]}"


def _share(count: int, total: int) -> str:
    if not total:
        return "–"
    low, high = wilson(count, total)
    return f"{100 * count / total:.2f} % ({100 * low:.2f}–{100 * high:.2f})"


def most(responses: Sequence[JudgedResponse], count: int) -> list[JudgedResponse]:
    """Returns up to ``count`` responses with Oops and as many with Aha, strict ones first."""
    picked: list[JudgedResponse] = []
    for kind in ("oops", "aha"):
        found = [one for one in responses if one.moments is not None and getattr(one.moments, kind)]
        picked += sorted(found, key=lambda one: not (one.moments and one.moments.strict))[:count]
    return picked
