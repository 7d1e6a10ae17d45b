"""The moments of a training step: recorded as responses are scored, summed over the leaders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.evaluation.estimates import wilson
from fipo_megatron.moments.candidates import CandidateExtractor
from fipo_megatron.moments.rates import COUNTS, MomentCounts
from fipo_megatron.moments.transitions import Judge, JudgedResponse, ResponseMoments, judge_response, moments_of
from fipo_megatron.reward.verifier_protocol import Verdict


@dataclass
class MomentTotals:
    """The moments of the responses of a step.

    Attributes:
        complete: Counts of the responses that ended by themselves.
        truncated: Number of responses that were cut off at the length limit; they are in no other count.
    """

    complete: MomentCounts = field(default_factory=MomentCounts)
    truncated: int = 0

    @classmethod
    def total(cls, parts: Iterable[MomentTotals]) -> MomentTotals:
        """Returns the sum of the moments of several leaders."""
        found = cls()
        for part in parts:
            found.complete.merge(part.complete)
            found.truncated += part.truncated
        return found

    def metrics(self) -> dict[str, Any]:
        """Returns the metrics ``moments/*``; a fraction of 0 responses is null."""
        counts = self.complete.counts
        found: dict[str, Any] = {f"moments/{name}": counts[name] for name in COUNTS}
        found["moments/truncated"] = self.truncated
        total = counts["responses"]
        for name in ("oops", "aha"):
            low, high = wilson(counts[name], total) if total else (None, None)
            found[f"moments/{name}_fraction"] = counts[name] / total if total else None
            found |= {f"moments/{name}_fraction_low": low, f"moments/{name}_fraction_high": high}
        mean = self.complete.after_right / self.complete.right if self.complete.right else None
        return found | {"moments/tokens_after_right_mean": mean}


class MomentRecorder:
    """Counts the moments of responses while they are scored.

    Args:
        extractor: Name of the extractor, ``observe.moments_extractor``.

    Raises:
        ValueError: The name is not valid.
    """

    def __init__(self, extractor: str) -> None:
        self._extractor = CandidateExtractor.named(extractor)
        self._totals = MomentTotals()

    async def record(self, text: str, trajectory: Trajectory, verdict: Verdict, judge: Judge) -> None:
        """Counts a response. The verifier is asked only about responses with several candidates.

        Args:
            text: Text of the response.
            trajectory: The response.
            verdict: Verdict on the whole response, which is that on a single candidate.
            judge: Judges a candidate.
        """
        if trajectory.finish_reason == "length":
            self._totals.truncated += 1
            return
        cleaned, candidates = self._extractor(text)
        found: ResponseMoments | Verdict = moments_of(
            cleaned, candidates, [verdict.correct] * len(candidates), self._extractor
        )
        if len(candidates) > 1:
            found = await judge_response(text, self._extractor, judge)
        if isinstance(found, Verdict) or verdict.failure:
            return
        length = len(trajectory.tokens)
        response = JudgedResponse(trajectory.name, None, trajectory.finish_reason, None, found, length)
        self._totals.complete.add(found, response.tokens_after_right)

    def take(self) -> MomentTotals:
        """Returns the counts since the last call, and begins anew."""
        found, self._totals = self._totals, MomentTotals()
        return found
