"""The lr = 0 gate of a run: two passes at equal weights must agree before the first update."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.update_metrics import NoiseError, NoiseFloor
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Trajectory

logger = logging.getLogger(__name__)


class LrZeroGate:
    """Checks the noise floor once per process, and reports it every so many steps.

    Args:
        actor: The policy.
        report_every: Steps between two reports (``run.noise_floor_every``); 0 reports none.
    """

    def __init__(self, actor: MegatronActor, report_every: int) -> None:
        self._actor, self._report_every = actor, report_every
        self._passed = False

    def check(self, step: int, mini_batch: MiniBatch, trajectories: Mapping[int, Trajectory]) -> NoiseFloor | None:
        """Measures the noise floor if no check has passed in this process, or a report is due.

        Args:
            step: Number of the step.
            mini_batch: First mini-batch of the step's plan.
            trajectories: Trajectories of this data-parallel rank, by index.

        Returns:
            The noise floor to report; None if none is due, or no token of the mini-batch is in the loss.

        Raises:
            NoiseError: The passes disagree, and none of this process has agreed before. Later disagreement is logged.
        """
        report = bool(self._report_every) and step % self._report_every == 0
        if self._passed and not report:
            return None
        try:
            floor = self._actor.check_noise_floor(mini_batch, trajectories, warm_up=not self._passed)
        except NoiseError as error:
            if not self._passed:
                raise
            logger.warning("%s", error)
            floor = error.floor
        self._passed = self._passed or floor is not None
        return floor if report else None
