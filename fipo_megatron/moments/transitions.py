"""Classifies how the answers within a response change: transitions, Oops and Aha.

The definitions are ours; the sources of the words publish none. Of a response with at least two candidates,

- the *transition* is from the first candidate to the last one, each right (R) or wrong (W);
- *Oops*: an earlier candidate is right, and the last one is wrong;
- *Aha*: the first candidate is wrong, and the last one is right;
- the *strict* form needs a reflection phrase between the two: for Oops between the first right candidate and the last
  one, for Aha between the first and the last one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fipo_megatron.data.trajectory import FinishReason
from fipo_megatron.moments.candidates import Candidate, CandidateExtractor, snippet
from fipo_megatron.reward.verifier_protocol import Answer, Verdict, Verifier

TRANSITIONS = ("R→R", "R→W", "W→R", "W→W")


@dataclass(frozen=True)
class ResponseMoments:
    """The candidates of one response and what became of them.

    Attributes:
        text: Cleaned response.
        candidates: Candidates in order of appearance.
        right: The verifier's verdict on each candidate.
        strict: Whether a reflection phrase stands between the two candidates that decide, if it is Oops or Aha.
    """

    text: str
    candidates: tuple[Candidate, ...]
    right: tuple[bool, ...]
    strict: bool = False

    @property
    def transition(self) -> str | None:
        """From the first to the last candidate; None with fewer than two."""
        if len(self.right) < 2:
            return None
        return f"{'RW'[not self.right[0]]}→{'RW'[not self.right[-1]]}"

    @property
    def oops(self) -> bool:
        """Whether an earlier candidate is right and the last one is wrong."""
        return len(self.right) > 1 and any(self.right[:-1]) and not self.right[-1]

    @property
    def aha(self) -> bool:
        """Whether the first candidate is wrong and the last one is right."""
        return len(self.right) > 1 and not self.right[0] and self.right[-1]

    @property
    def end_of_first_right(self) -> int | None:
        """Position after the first right candidate; None if none is right."""
        return next((c.end for c, right in zip(self.candidates, self.right, strict=True) if right), None)


Judge = Callable[[Candidate], Awaitable[Verdict]]
"""Judges a candidate."""


def moments_of(
    text: str, candidates: Sequence[Candidate], right: Sequence[bool], extractor: CandidateExtractor
) -> ResponseMoments:
    """Returns the moments of a response whose candidates are judged."""
    found = ResponseMoments(text, tuple(candidates), tuple(right))
    if not (found.oops or found.aha):
        return found
    first = list(right).index(True) if found.oops else 0
    between = (candidates[first].end, candidates[-1].start)
    strict = extractor.phrases.reflection.search(text, *between) is not None
    return ResponseMoments(text, tuple(candidates), tuple(right), strict)


async def judge_response(response: str, extractor: CandidateExtractor, judge: Judge) -> ResponseMoments | Verdict:
    """Finds and judges the candidates of a response; returns a verdict instead if a check failed.

    Equal candidates are judged once.
    """
    text, candidates = extractor(response)
    known: dict[str, bool] = {}
    for candidate in candidates:
        if candidate.text not in known:
            verdict = await judge(candidate)
            if verdict.failure:
                return verdict
            known[candidate.text] = verdict.correct
    return moments_of(text, candidates, [known[candidate.text] for candidate in candidates], extractor)


def judge_with(verifier: Verifier, name: str, ground_truth: str, prompt: str = "", data_source: str = "") -> Judge:
    """Returns a function that judges candidates by a verifier.

    Args:
        verifier: The verifier.
        name: Its name, ``reward.verifier``.
        ground_truth: Right answer.
        prompt: Text of the prompt.
        data_source: Name of the data set.
    """

    async def judge(candidate: Candidate) -> Verdict:
        return await verifier.verify(Answer(snippet(candidate, name), ground_truth, prompt, data_source))

    return judge


@dataclass(frozen=True)
class JudgedResponse:
    """A response of a file with its moments.

    Attributes:
        name: Name of the response, for people.
        step: Step of the run; None if there is none.
        finish_reason: Why the response ended.
        accuracy: The verdict that the file records on the whole response; None without one.
        moments: Its moments; None if a check failed.
        tokens: Length in tokens; None if it is not recorded.
    """

    name: str
    step: int | None
    finish_reason: FinishReason
    accuracy: int | None
    moments: ResponseMoments | None
    tokens: int | None

    @property
    def truncated(self) -> bool:
        """Whether the response was cut off at the length limit."""
        return self.finish_reason == "length"

    @property
    def tokens_after_right(self) -> float | None:
        """Tokens after the first right candidate, by the share of characters; None if none is right."""
        if self.moments is None or self.tokens is None or (end := self.moments.end_of_first_right) is None:
            return None
        return self.tokens * (1 - end / max(1, len(self.moments.text)))
