"""The results of an evaluation: per problem, per data set, and as the scalars of ``evaluation.jsonl``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.evaluation.estimates import Estimate, Vote, estimate, k_values, pass_at_k
from fipo_megatron.storage.atomic import write_atomic
from fipo_megatron.storage.json_lines import is_regular, make_directory

_PROBLEMS_NAME = re.compile(r"step-(?P<step>[0-9]{6,})\.jsonl|\.step-[0-9]{6,}\.jsonl(?P<partial>\.partial)")


def data_set_name(data_source: str) -> str:
    """Returns the name of a data set in tags and files: all but letters, digits, ``.`` and ``-`` become ``_``."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", data_source) or "unnamed"


def name_problems(data_sources: Iterable[str]) -> list[str]:
    """Describes, one line each, the data sources whose names as data sets are equal."""
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
    """The responses to one problem, counted: a row of ``evaluations/step-….jsonl`` and ``problems.jsonl``.

    Attributes:
        data_set: Name of the data set.
        id: Identifier of the problem.
        ground_truth: Right answer.
        samples: k, the number of responses.
        right: Number of right responses.
        answered: Number of responses with an answer that votes.
        answers: Number of votes of each normalised answer, the most frequent first.
        response_tokens: Mean length of the responses in tokens.
        truncated: Number of responses that were cut off at the length limit.
        consensus: Answer that won the vote; None without answers.
        consensus_right: Whether the consensus is right.
        failed: Number of responses whose check failed; they are neither right nor wrong, and do not vote. Not in the
            row if it is 0.
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
    failed: int = 0

    @property
    def checked(self) -> int:
        """Number of responses with a verdict."""
        return self.samples - self.failed

    @classmethod
    def of(
        cls,
        data_set: str,
        problem_id: str,
        ground_truth: str,
        right: Sequence[bool],
        lengths: Sequence[int],
        truncated: int,
        voted: Vote,
    ) -> ProblemResult:
        """Returns the result of one problem.

        Args:
            data_set: Name of the data set.
            problem_id: Identifier of the problem.
            ground_truth: Right answer.
            right: The verifier's verdict on each response whose check did not fail.
            lengths: Tokens of each response.
            truncated: Number of responses that were cut off at the length limit.
            voted: Vote over the answers.
        """
        return cls(
            data_set,
            problem_id,
            ground_truth,
            samples=len(lengths),
            right=sum(map(bool, right)),
            answered=sum(voted.counts.values()),
            answers=voted.counts,
            response_tokens=math.fsum(lengths) / len(lengths),
            truncated=truncated,
            consensus=voted.consensus,
            consensus_right=voted.right,
            failed=len(lengths) - len(right),
        )


@dataclass(frozen=True)
class DataSetResult:
    """The statistics of one data set.

    Attributes:
        name: Name of the data set.
        problems: Number of problems.
        samples: k, the number of responses to each problem.
        avg: avg@k.
        cons: cons@k; has no value if some responses are right but none has an answer that votes.
        passes: pass@k for k = 1, 2, 4, … and n.
        response_tokens: Mean length of a response in tokens.
        truncated_fraction: Fraction of the responses that were cut off at the length limit.
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
        """Returns the statistics of the problems of a data set, all with the same number of responses.

        Responses whose check failed are left out, and so are problems of which no response was checked. pass@k of a
        problem with fewer than k checked responses is that of all of them.
        """
        samples = rows[0].samples
        ks = k_values(samples)
        checked = [row for row in rows if row.checked]
        columns = [
            [row.right / row.checked for row in checked],
            [float(row.consensus_right) for row in checked],
            *([pass_at_k(row.checked, row.right, min(k, row.checked)) for row in checked] for k in ks),
        ]
        avg, cons, *passes = estimate(columns) if checked else [Estimate(None)] * len(columns)
        votes = any(row.answered for row in rows) or not any(row.right for row in rows)
        return cls(
            name,
            len(rows),
            samples,
            avg,
            cons if votes else Estimate(None),
            dict(zip(ks, passes, strict=True)),
            math.fsum(row.response_tokens for row in rows) / len(rows),
            sum(row.truncated for row in rows) / (samples * len(rows)),
        )

    def scalars(self) -> dict[str, float | None]:
        """Returns the metrics by tag; see :data:`.observe.metrics.OF_DATA_SETS`."""
        values: dict[str, float | None] = {}
        for name, mean in {"avg": self.avg, "cons": self.cons, "pass": self.passes[self.samples]}.items():
            values |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
        values |= {"response_tokens": self.response_tokens, "truncated_fraction": self.truncated_fraction}
        return {f"evaluation/{self.name}/{tag}": value for tag, value in values.items()}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        problems: Results of the problems, in the order of the files.
    """

    problems: tuple[ProblemResult, ...]

    @property
    def accuracy(self) -> float:
        """avg@k over all problems."""
        return sum(row.right for row in self.problems) / sum(row.checked for row in self.problems)

    @property
    def failed_checks(self) -> int:
        """Number of responses whose check failed."""
        return sum(row.failed for row in self.problems)

    @property
    def response_tokens(self) -> float:
        """Mean length of a response in tokens."""
        return math.fsum(row.response_tokens for row in self.problems) / len(self.problems)

    def data_sets(self) -> list[DataSetResult]:
        """Returns the statistics of each data set, in the order in which the files name them."""
        names = dict.fromkeys(row.data_set for row in self.problems)
        return [DataSetResult.of(name, [row for row in self.problems if row.data_set == name]) for name in names]

    def scalars(self) -> dict[str, float | None]:
        """Returns the metrics by tag: a row of ``evaluation.jsonl``."""
        values: dict[str, float | None] = {
            "evaluation/accuracy": self.accuracy,
            "evaluation/response_tokens": self.response_tokens,
        }
        if self.failed_checks:
            values["evaluation/failed_checks"] = self.failed_checks
        for data_set in self.data_sets():
            values |= data_set.scalars()
        return values


def write_problems(file: Path, problems: Iterable[ProblemResult]) -> None:
    """Writes one JSON object per line; the file appears whole."""
    make_directory(file.parent)
    write_atomic(file, "".join(json.dumps(_row(problem)) + "\n" for problem in problems))


def _row(problem: ProblemResult) -> dict[str, Any]:
    row = asdict(problem)
    return row if problem.failed else {name: value for name, value in row.items() if name != "failed"}


def problems_file(output: Path, step: int) -> Path:
    """Returns the file of a run that holds the rows of the evaluation at a step."""
    return output / "evaluations" / f"step-{step:06}.jsonl"


def cut_problems(output: Path, step: int) -> None:
    """Removes the files of evaluations at this step and later, and partial files; foreign files are left alone."""
    for file in (output / "evaluations").glob("*step-*.jsonl*"):
        match = _PROBLEMS_NAME.fullmatch(file.name)
        if match and (match["partial"] or int(match["step"]) >= step) and is_regular(file):
            file.unlink()
