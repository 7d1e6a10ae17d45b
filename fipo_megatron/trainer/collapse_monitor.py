"""Collapse of the policy: raises the alarm, decides what follows, and records rollbacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fipo_megatron.actor.collectives import broadcast_from_first_rank, raise_on_all_ranks
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.checkpoint.manager import CheckpointManager, TrainState
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.config import HealthConfig
from fipo_megatron.observe.collapse_alarm import Alarm, CollapseAlarm, CollapseError
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.trainer import rollback_record
from fipo_megatron.trainer.rollback_record import Rollback
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger(__name__)


class CollapseMonitor:
    """The collapse alarm of a run and its rollbacks, on this rank.

    Args:
        config: Limits of the alarm, and what follows when it is raised.
        output: Output directory of the run.
        checkpoints: Checkpoints to roll back to.
        log: Files of the run; alarms are written to ``alarms.jsonl``.
        layout: Layout of this rank.

    Attributes:
        rollbacks: Number of rollbacks so far.
    """

    def __init__(
        self, config: HealthConfig, output: Path, checkpoints: CheckpointManager, log: RunLog, layout: RankLayout
    ) -> None:
        self._config, self._output, self._checkpoints, self._log, self._layout = (
            config,
            output,
            checkpoints,
            log,
            layout,
        )
        self._alarm = CollapseAlarm(config)
        self._restored_step: int | None = None
        self.rollbacks = 0

    def check(self, step: int, metrics: Mapping[str, Any]) -> tuple[dict[str, float], Alarm | None]:
        """Judges the metrics of a step.

        Returns:
            The ``health/…`` metrics of the step, and the alarm if it is raised and ``health.action`` is more than a
            warning.
        """
        report, alarm = self._alarm.look(step, metrics)
        if alarm is None:
            return report, None
        logger.error("ALARM in step %d: %s", step, alarm.reason)
        if self._config.action == "warn":
            self._log.alarm(alarm, "warn")
            return report, None
        return report, alarm

    @property
    def safe_step(self) -> int | None:
        """The last step whose checkpoint precedes any collapse in sight; None before the first judged step."""
        return None if self._alarm.safe is None else self._last_sound_step(self._alarm.safe)

    def _last_sound_step(self, began: int) -> int:
        """Returns the last step whose checkpoint precedes a collapse that began in step ``began``.

        That is the checkpoint of ``began`` itself, or a later one that the run was rolled back to.
        """
        return began if self._restored_step is None else max(began, self._restored_step)

    def find_rollback(self, alarm: Alarm) -> tuple[Path | None, str]:
        """Looks for the checkpoint to roll back to. A collective of all ranks.

        Returns:
            The checkpoint and an empty string; or None and what the user can do about it.
        """
        health, until = self._config, self._last_sound_step(alarm.began)
        if health.action != "roll_back":
            return None, (
                f"With health.action=roll_back it returns to the checkpoint of step {until} or before, where there is "
                "one, if the next window is no better"
            )
        if self.rollbacks >= health.max_roll_backs:
            return None, (
                f"It has returned {self.rollbacks} times: with health.max_roll_backs={self.rollbacks + 1} it "
                "returns once more, if the next window is no better"
            )
        self._checkpoints.finish()
        path = None
        with suppress(WeightsError):  # no checkpoint is whole; the damaged ones have been logged
            path = self._checkpoints.newest(until=until)
        if path is None:
            return None, f"It cannot return: there is no whole checkpoint of step {until} or before"
        return path, ""

    @staticmethod
    def collapse_error(alarm: Alarm, advice: str, *, is_last: bool) -> CollapseError:
        """Returns the error that ends a run after an alarm: why it ended, and what the user can do.

        Args:
            alarm: The alarm.
            advice: Second return value of :meth:`find_rollback`.
            is_last: Whether the step was the last one of ``run.steps``.
        """
        more = " Either needs a larger run.steps: this was the last step." if is_last else ""
        return CollapseError(
            f"the run has collapsed: {alarm.reason}. It is saved: run again with health.action=warn, it goes on all "
            f"the same. {advice}.{more}"
        )

    def record_rollback(self, alarm: Alarm, path: Path, cursor: int, learning_rate_factor: float) -> None:
        """Records a rollback and sets the collapsed checkpoints aside. A collective of all ranks.

        Args:
            alarm: The alarm.
            path: Checkpoint to roll back to.
            cursor: Number of prompts consumed so far.
            learning_rate_factor: Learning-rate factor before the rollback.
        """
        with raise_on_all_ranks("returning to an earlier checkpoint"):
            if self._layout.rank == 0:
                event = Rollback(
                    number=self.rollbacks + 1,
                    step=alarm.step,
                    to=Manifest.read(path).step,
                    cursor=cursor,
                    learning_rate_factor=learning_rate_factor * self._config.roll_back_lr,
                    reason=alarm.reason,
                )
                events = [*rollback_record.done(rollback_record.read(self._output), self.rollbacks), event]
                rollback_record.write(self._output, events)
                rollback_record.set_aside_collapsed(self._checkpoints.directory, events)

    def position_after(self, saved: Manifest) -> tuple[TrainState, bool]:
        """Returns the position with which to resume a checkpoint. A collective of all ranks.

        Returns:
            The position, and whether the run was rolled back to this checkpoint after it was saved. Then later prompts
            and a lower learning rate follow, and the checkpoint's carry-over is void.
        """
        events = broadcast_from_first_rank(self._read_events(), self._layout.device)
        state = TrainState(saved.step, saved.cursor, saved.rollbacks, saved.learning_rate_factor)
        done, event = rollback_record.done(events, saved.rollbacks), rollback_record.pending(events, saved)
        if event is not None:
            state = TrainState(saved.step, event.cursor, event.number, event.learning_rate_factor)
            done = [event]
        self.rollbacks = state.rollbacks
        self._restored_step = done[-1].to if done else None
        return state, event is not None

    def set_aside_collapsed(self) -> None:
        """Sets aside what a rollback left behind before it was killed. A collective of all ranks."""
        with raise_on_all_ranks("looking for checkpoints"):
            if self._layout.rank == 0:
                rollback_record.set_bad_rows_aside(self._output)
                rollback_record.set_aside_collapsed(self._checkpoints.directory, rollback_record.read(self._output))

    def forget_later_rollbacks(self) -> None:
        """Removes recorded rollbacks whose checkpoint is gone: the run resumes from before them."""
        if self._layout.rank == 0:
            events = rollback_record.read(self._output)
            if (kept := rollback_record.done(events, self.rollbacks)) != events:
                rollback_record.write(self._output, kept)

    def restore(self, step: int | None = None) -> None:
        """Restores the alarm's history: that of the run's files, or after a rollback that of before ``step``."""
        if step is None:
            self._alarm.restore(broadcast_from_first_rank(self._log.seen(), self._layout.device))
        else:
            self._alarm.restore(sample for sample in self._alarm.history if sample[0] < step)

    def _read_events(self) -> list[Rollback]:
        return rollback_record.read(self._output) if self._layout.rank == 0 else []
