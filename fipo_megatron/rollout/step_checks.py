"""The checks of a sampling step on all leaders, and the decision whether the verifier works."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.trajectory import Prompt

logger = logging.getLogger(__name__)


class StepChecks:
    """The checks of a step.

    Attributes:
        mine: Checks of this rank.
        everyone: Checks of all leaders, as of the last :meth:`judge`.
        error: Error text of a verifier that does not work on this rank; empty if it works.
        dropped_unchecked: Prompts of this rank whose groups were dropped with a failed check.
    """

    def __init__(self) -> None:
        self.mine, self.everyone = CheckCounts(), CheckCounts()
        self.error = ""
        self.dropped_unchecked: list[Prompt] = []

    def clear(self) -> None:
        """Forgets the step before."""
        self.mine.clear()
        self.everyone.clear()
        self.error = ""
        self.dropped_unchecked.clear()

    def judge(self, checks: Sequence[CheckCounts], errors: Sequence[str], max_failures: float, *, warns: bool) -> None:
        """Decides, equally on every rank, whether the step goes on.

        Args:
            checks: Checks of each leader so far.
            errors: ``error`` of each leader.
            max_failures: Largest fraction of failed checks.
            warns: Whether this rank warns of kinds of failures that are new in the step.

        Raises:
            VerifierError: A verifier does not work, or failed on too many answers.
        """
        before, now = self.everyone, CheckCounts.total(checks)
        self.everyone = now
        if warns:
            for kind in now.failures.keys() - before.failures.keys():
                logger.warning("%s", now.warning(kind))
        if now.exceeds(max_failures):
            raise now.error(max_failures)
        for error in filter(None, errors):
            raise VerifierError(error)
