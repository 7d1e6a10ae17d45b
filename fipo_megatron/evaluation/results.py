"""What an evaluation has found: of every problem, of every data set, and as the scalars of ``evaluation.jsonl``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fipo_megatron.evaluation.estimates import Estimate, Vote, estimate, ks, pass_at_k
from fipo_megatron.storage.atomic import write_atomic


def data_set_name(data_source: str) -> str:
    """The name of a data set in tags and files: other characters than letters, digits, ``_``, ``.`` and ``-`` are _."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", data_source) or "unnamed"


def name_problems(data_sources: Iterable[str]) -> list[str]:
    """Data sources that would be taken for one data set, a sentence each."""
    by_name: dict[str, str] = {}
    problems = []
    for source in dict.fromkeys(data_sources):
        name = data_set_name(source)
        if name in by_name:
            problems.append(
                f"evaluation.files: data_source = {source!r} and {by_name[name]!r}: both are called {name}; they must "
                "differ in letters, digits, _, . or -"
            )
        by_name.setdefault(name, source)
    return problems


@dataclass(frozen=True)
class ProblemResult:
    """What was answered to a problem: a row of ``evaluations/step-….jsonl`` and ``problems.jsonl``.

    Attributes:
        data_set: That it belongs to.
        id: Of the problem.
        ground_truth: The right answer.
        samples: Responses, k.
        right: Right ones.
        answered: Those with an answer that votes.
        answers: How often each was given, normalised; the most frequent first.
        response_tokens: Mean length of the responses.
        truncated: Responses that were cut off at the length limit.
        consensus: The answer that the vote has found; None without an answer.
        consensus_right: Whether it is right.
    """

    data_set: str
    id: str
    ground_truth: str
    samples: int
    right: int
    answered: int
    answers: dict[str, int]
    response_tokens: float
    truncated: int
    consensus: str | None
    consensus_right: bool

    @classmethod
    def of(
        cls,
        data_set: str,
        id_: str,
        ground_truth: str,
        right: Sequence[bool],
        lengths: Sequence[int],
        cut: int,
        v: Vote,
    ) -> ProblemResult:
        """Of the responses to a problem, their lengths, how many were cut off, and their vote."""
        mean = math.fsum(lengths) / len(lengths)
        return cls(
            data_set,
            id_,
            ground_truth,
            samples=len(right),
            right=sum(map(bool, right)),
            answered=sum(v.counts.values()),
            answers=v.counts,
            response_tokens=mean,
            truncated=cut,
            consensus=v.consensus,
            consensus_right=v.right,
        )


@dataclass(frozen=True)
class DataSetResult:
    """Of the problems of a data set.

    Attributes:
        name: Of the data set.
        problems: How many.
        samples: k.
        avg: avg@k.
        cons: cons@k; does not exist where responses were right and none has an answer that votes.
        passes: pass@k for k = 1, 2, 4, … and n.
        response_tokens: Mean length of a response.
        truncated_fraction: Responses that were cut off at the length limit.
    """

    name: str
    problems: int
    samples: int
    avg: Estimate
    cons: Estimate
    passes: dict[int, Estimate]
    response_tokens: float
    truncated_fraction: float

    @classmethod
    def of(cls, name: str, rows: Sequence[ProblemResult]) -> DataSetResult:
        """All of the same k."""
        samples = rows[0].samples
        avg, cons, *passes = estimate(
            [
                [row.right / samples for row in rows],
                [float(row.consensus_right) for row in rows],
                *([pass_at_k(samples, row.right, k) for row in rows] for k in ks(samples)),
            ]
        )
        votes = any(row.answered for row in rows) or not any(row.right for row in rows)
        return cls(
            name,
            len(rows),
            samples,
            avg,
            cons if votes else Estimate(None),
            dict(zip(ks(samples), passes, strict=True)),
            math.fsum(row.response_tokens for row in rows) / len(rows),
            sum(row.truncated for row in rows) / (samples * len(rows)),
        )

    def scalars(self) -> dict[str, float | None]:
        """By tag; see :data:`.observe.metrics.OF_DATA_SETS`."""
        found: dict[str, float | None] = {}
        for name, one in {"avg": self.avg, "cons": self.cons, "pass": self.passes[self.samples]}.items():
            found |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        found |= {"response_tokens": self.response_tokens, "truncated_fraction": self.truncated_fraction}
        return {f"evaluation/{self.name}/{tag}": value for tag, value in found.items()}


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        problems: In the order of the files.
    """

    problems: tuple[ProblemResult, ...]

    @property
    def accuracy(self) -> float:
        """avg@k over all problems."""
        return sum(row.right for row in self.problems) / sum(row.samples for row in self.problems)

    @property
    def response_tokens(self) -> float:
        """Mean length of a response."""
        return math.fsum(row.response_tokens for row in self.problems) / len(self.problems)

    def data_sets(self) -> list[DataSetResult]:
        """In the order in which the files name them."""
        names = dict.fromkeys(row.data_set for row in self.problems)
        return [DataSetResult.of(name, [row for row in self.problems if row.data_set == name]) for name in names]

    def scalars(self) -> dict[str, float | None]:
        """By tag: a row of ``evaluation.jsonl``."""
        found: dict[str, float | None] = {
            "evaluation/accuracy": self.accuracy,
            "evaluation/response_tokens": self.response_tokens,
        }
        for data_set in self.data_sets():
            found |= data_set.scalars()
        return found


def write_problems(file: Path, problems: Iterable[ProblemResult]) -> None:
    """One JSON object per line; the file appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def problems_file(output: Path, step: int) -> Path:
    """Where a run has the rows of an evaluation."""
    return output / "evaluations" / f"step-{step:06}.jsonl"


def cut_problems(output: Path, step: int) -> None:
    """Removes the rows of evaluations at this step and later ones, and what is not whole."""
    for file in (output / "evaluations").glob("step-*.jsonl"):
        if int(file.stem.rpartition("-")[2]) >= step:
            file.unlink()
    for file in (output / "evaluations").glob(".*.partial"):
        file.unlink()
