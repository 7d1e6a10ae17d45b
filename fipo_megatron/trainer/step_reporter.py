"""Reports a step: metrics that are equal on every rank, and some responses, gathered on the first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.update_metrics import NoiseFloor, TokenPart, UpdateMetrics
from fipo_megatron.config import Config
from fipo_megatron.data.batch import Batch
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Group
from fipo_megatron.moments.recording import MomentTotals
from fipo_megatron.observe.devices import peak_flops
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.observe.step_metrics import noise_metrics, probe_metrics, rollout_metrics, update_metrics
from fipo_megatron.observe.throughput import FORWARD, TRAINING, balance, model_flops, throughput
from fipo_megatron.observe.trajectory_files import choose, row_of, token_columns
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.rollout.sampler import SampledGroups
from fipo_megatron.rollout.weight_sync.probe import ProbeShift
from fipo_megatron.trainer.step_timer import StepTimer
from fipo_megatron.trainer.training_inputs import TrainingInputs

Row = dict[str, Any]


class StepReporter:
    """Writes the metrics, responses and times of each step.

    Args:
        config: Configuration of the run.
        inputs: Inputs of the run.
        layout: Layout of this rank.
        log: Files and trackers of the run; the first rank writes them.
        timer: Timer of the step.
    """

    def __init__(
        self, config: Config, inputs: TrainingInputs, layout: RankLayout, log: RunLog, timer: StepTimer
    ) -> None:
        self._config, self._inputs, self._layout, self._log, self._timer = config, inputs, layout, log, timer
        self._group = dist.new_group(backend="gloo")
        name = torch.cuda.get_device_name() if layout.device.type == "cuda" else ""
        peak = peak_flops(name)
        self._lockstep = config.actor.parallel.data_ranks_in_lockstep
        self._peak = None if peak is None else peak * layout.world_size

    def traced(self, records: Sequence[GroupRecord], batch: Batch, step: int) -> frozenset[int]:
        """Returns the indices of the trajectories whose per-token values ``trajectories/`` will show."""
        if not self._config.observe.trajectory_tokens:
            return frozenset()
        return frozenset(batch.names.index(name) for name in self._kept(records, step))

    def metrics(
        self,
        step: int,
        sampled: SampledGroups | None,
        updates: Sequence[UpdateMetrics],
        noise: NoiseFloor | None,
        probe: ProbeShift | None = None,
    ) -> dict[str, Any]:
        """Returns the metrics of a step by tag, without those of the collapse alarm; the same on every rank.

        Args:
            step: Number of the step.
            sampled: Groups of the step; None for SFT.
            updates: Metrics of each update.
            noise: Noise floor to report; None if none is due.
            probe: Difference of engine and actor after the weights were sent; None without a probe.
        """
        values = rollout_metrics(sampled, step) | self._missing_groups(sampled)
        values |= update_metrics(updates, sft=self._config.algorithm.kind == "sft") | probe_metrics(probe)
        return values | noise_metrics(noise, values, fipo=self._config.algorithm.kind == "fipo")

    def moments(self, scorer: ResponseScorer | None) -> dict[str, Any]:
        """Returns the metrics ``moments/*`` of the responses scored since the last call, over all leaders.

        A collective of all ranks with ``observe.moments``; nothing otherwise.
        """
        if not self._config.observe.moments or scorer is None:
            return {}
        everyone: list[MomentTotals] = [MomentTotals()] * self._layout.world_size
        dist.all_gather_object(everyone, scorer.take_moments(), group=self._group)
        return MomentTotals.total(everyone).metrics()

    def _missing_groups(self, sampled: SampledGroups | None) -> dict[str, int]:
        """Returns the number of groups that a sampled step lacks; empty if it has as many as configured."""
        need = self._config.rollout.prompts_per_step
        if sampled is None or self._config.run.replay or not 0 < len(sampled.records) < need:
            return {}
        return {"rollout/groups_missing": need - len(sampled.records)}

    def write(
        self,
        step: int,
        metrics: Mapping[str, Any],
        sampled: SampledGroups | None,
        groups: Sequence[Group],
        batch: Batch,
        updates: Sequence[UpdateMetrics],
    ) -> None:
        """Writes metrics and responses of a step. A collective of all ranks.

        Args:
            step: Number of the step.
            metrics: Metrics by tag.
            sampled: Groups of the step as every rank knows them; None for SFT.
            groups: Groups that this rank sampled, with advantages.
            batch: Batch of the step.
            updates: Metrics of each update.
        """
        with self._timer.part("observe"):
            kept, shown = ([], []) if sampled is None else self._rows(step, sampled.records, groups, batch, updates)
        self._log.step(step, metrics, sampled, updates, kept, shown)

    def write_timing(
        self,
        step: int,
        sampled: SampledGroups | None,
        batch: Batch,
        plan: Sequence[MiniBatch],
        updates: Sequence[UpdateMetrics],
        reward_seconds: float | None,
    ) -> None:
        """Writes the times and rates of a step that is over.

        Args:
            step: Number of the step.
            sampled: Groups of the step; None for SFT.
            batch: Batch of the step.
            plan: Micro-batches of the step.
            updates: Metrics of each update.
            reward_seconds: Seconds in which at least one response was being scored; None without a verifier.
        """
        seconds = self._timer.seconds()
        if reward_seconds is not None:
            seconds["reward"] = reward_seconds
        rates = self._rates(sampled, batch, updates, seconds)
        if updates:
            rates |= balance(plan, batch.lengths, self._inputs.architecture, lockstep=self._lockstep)
        self._log.timing(step, seconds, rates)

    def _kept(self, records: Sequence[GroupRecord], step: int) -> list[str]:
        """Returns the names of the responses that the trajectory file keeps; the same on every rank."""
        observe = self._config.observe
        return choose(records, observe.trajectories if step % observe.trajectories_every == 0 else 0)

    def _shown(self, records: Sequence[GroupRecord]) -> list[str]:
        """Returns the names of the responses that trackers show; the same on every rank."""
        observe = self._config.observe
        return choose(records, observe.texts if observe.tensorboard or observe.trackers else 0)

    def _rows(
        self,
        step: int,
        records: Sequence[GroupRecord],
        groups: Sequence[Group],
        batch: Batch,
        updates: Sequence[UpdateMetrics],
    ) -> tuple[list[Row], list[Row]]:
        """Returns the rows of the trajectory file and of trackers on the first rank, empty lists elsewhere."""
        kept, shown = self._kept(records, step), self._shown(records)
        names = list(dict.fromkeys((*kept, *shown)))
        if not names:
            return [], []
        mine = {t.name: t for group in groups for t in group.trajectories if t.name in names}
        parts = {index: part for update in updates for index, part in update.tokens.items()}
        everyone: list[Any] = [(mine, parts)]
        if self._layout.world_size > 1:
            everyone = [None] * self._layout.world_size if self._layout.rank == 0 else []
            dist.gather_object((mine, parts), everyone or None, dst=0, group=self._group)
        if self._layout.rank != 0:
            return [], []
        rows = self._rows_by_name(step, names, batch, everyone)
        return [rows[name] for name in kept], [rows[name] for name in shown]

    def _rows_by_name(self, step: int, names: Sequence[str], batch: Batch, everyone: Sequence[Any]) -> dict[str, Row]:
        trajectories = {name: t for mine, _ in everyone for name, t in mine.items()}
        found: list[dict[int, TokenPart]] = [parts for _, parts in everyone]
        rows = {}
        for name in names:
            index, trajectory = batch.names.index(name), trajectories[name]
            update = next((n for n, members in enumerate(batch.mini_batches) if index in members), -1)
            row = row_of(trajectory, step, update, self._decode)
            if parts := [part[index] for part in found if index in part]:
                row["tokens"] = token_columns(trajectory, parts, self._decode)
            rows[name] = row
        return rows

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._inputs.tokenizer.decode(list(token_ids)))

    def _rates(
        self,
        sampled: SampledGroups | None,
        batch: Batch,
        updates: Sequence[UpdateMetrics],
        seconds: Mapping[str, float],
    ) -> dict[str, float | None]:
        """Returns tokens per second, FLOP/s and their share of the peak."""
        generated = None if sampled is None or self._config.run.replay else sampled.statistics.get("tokens_sampled", 0)
        passes = TRAINING + FORWARD * bool(self._config.algorithm.kl_coef)
        flops = passes * model_flops(self._inputs.architecture, batch.lengths)
        if self._config.algorithm.kind != "sft":  # the first update gives the log-probs of π_old itself
            later = [batch.lengths[i] for members in batch.mini_batches[1:] for i in members]
            flops += FORWARD * model_flops(self._inputs.architecture, later)
        return throughput(
            generated=generated,
            generating=sampled.seconds if sampled is not None else 0.0,
            trained=sum(batch.lengths) if updates else 0,
            training=seconds.get("log_probs", 0.0) + seconds.get("update", 0.0),
            step=seconds["step"],
            flops=flops,
            peak=self._peak,
        )
