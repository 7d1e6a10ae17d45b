"""Counts of checks that gave no verdict, and the error that ends a step or an evaluation with too many of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


class VerifierError(RuntimeError):
    """The verifier does not work; the message holds its first error text."""


@dataclass
class CheckCounts:
    """The checks of a step or of an evaluation.

    Attributes:
        checks: Number of answers that were given to the verifier.
        failures: Number of checks without a verdict by kind of failure.
        texts: First error text of each kind.
    """

    checks: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, failure: str, text: str) -> None:
        """Counts one check; ``failure`` is empty if it has a verdict."""
        self.checks += 1
        if failure:
            self.failures[failure] = self.failures.get(failure, 0) + 1
            self.texts.setdefault(failure, text)

    def clear(self) -> None:
        """Sets all counts to 0."""
        self.checks = 0
        self.failures.clear()
        self.texts.clear()

    @classmethod
    def total(cls, parts: Iterable[CheckCounts]) -> CheckCounts:
        """Returns the sum of the counts of several ranks, with the texts of the first rank that has one."""
        found = cls()
        for part in parts:
            found.checks += part.checks
            for kind, count in part.failures.items():
                found.failures[kind] = found.failures.get(kind, 0) + count
            found.texts = part.texts | found.texts
        return found

    @property
    def failed(self) -> int:
        """Number of checks without a verdict."""
        return sum(self.failures.values())

    def exceeds(self, fraction: float) -> bool:
        """Returns whether more than this fraction of the checks, or all of them, failed."""
        return self.failed > fraction * self.checks or 0 < self.checks == self.failed

    def error(self, fraction: float) -> VerifierError:
        """Returns the error for a fraction of failures above ``reward.max_failure_fraction``."""
        kinds = ", ".join(f"{count} × {kind}" for kind, count in self.failures.items())
        kind, text = next(iter(self.texts.items()))
        return VerifierError(
            f"the verifier failed on {self.failed} of {self.checks} answers ({kinds}); "
            f"reward.max_failure_fraction = {fraction:g}. The first error, {kind}: {text}"
        )

    def warning(self, kind: str) -> str:
        """Returns the warning about the failures of a kind, with their first error text."""
        return f"the verifier failed on {self.failures[kind]} of {self.checks} answers, {kind}: {self.texts[kind]}"
