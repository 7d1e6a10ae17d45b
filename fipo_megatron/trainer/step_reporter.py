"""What is reported of a step: the same numbers on every rank, and some responses, brought to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.update_metrics import NoiseFloor, TokenPart, UpdateMetrics
from fipo_megatron.config import Config
from fipo_megatron.data.batch import Batch, compute_advantages
from fipo_megatron.observe.step_metrics import noise_metrics, rollout_metrics, update_metrics
from fipo_megatron.observe.throughput import FORWARD, TRAINING, model_flops, peak_flops, throughput
from fipo_megatron.observe.trajectory_files import choose, row_of, token_columns
from fipo_megatron.rollout.sampler import SampledGroups
from fipo_megatron.trainer.training_inputs import TrainingInputs


class StepReporter:
    """Of a run, on this rank.

    Args:
        config: Of the run.
        inputs: Of the run.
        layout: Of this rank.
    """

    def __init__(self, config: Config, inputs: TrainingInputs, layout: RankLayout) -> None:
        self._config, self._inputs, self._layout = config, inputs, layout
        self._group = dist.new_group(backend="gloo")
        name = torch.cuda.get_device_name() if layout.device.type == "cuda" else ""
        peak = peak_flops(name)
        self._peak = None if peak is None else peak * layout.world_size

    def _kept(self, sampled: SampledGroups, step: int) -> list[str]:
        """Names of the responses of the trajectory file; the same on every rank."""
        observe = self._config.observe
        return choose(sampled.records, observe.trajectories if step % observe.trajectories_every == 0 else 0)

    def _shown(self, sampled: SampledGroups) -> list[str]:
        """Names of those that trackers show; the same on every rank."""
        observe = self._config.observe
        return choose(sampled.records, observe.texts if observe.tensorboard or observe.trackers else 0)

    def watched(self, sampled: SampledGroups, batch: Batch, step: int) -> frozenset[int]:
        """Indices of those whose tokens are wanted."""
        if not self._config.observe.trajectory_tokens:
            return frozenset()
        return frozenset(batch.names.index(name) for name in self._kept(sampled, step))

    def values(
        self, step: int, sampled: SampledGroups | None, updates: Sequence[UpdateMetrics], noise: NoiseFloor | None
    ) -> dict[str, Any]:
        """Metrics of a step by tag, without those of the alarm; no collective."""
        values = rollout_metrics(sampled, step) | update_metrics(updates)
        return values | noise_metrics(noise, values, fipo=self._config.algorithm.kind == "fipo")

    def rows(
        self, step: int, sampled: SampledGroups | None, batch: Batch, updates: Sequence[UpdateMetrics]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of the trajectory file, and of trackers, on the first rank; empty elsewhere. A collective of all ranks."""
        if sampled is None:
            return [], []
        kept, shown = self._kept(sampled, step), self._shown(sampled)
        names = list(dict.fromkeys((*kept, *shown)))
        if not names:
            return [], []
        wanted = {name.rpartition("/")[0] for name in names}
        groups = compute_advantages(
            (group for group in sampled.groups if group.prompt.id in wanted), self._config.algorithm
        )
        mine = {t.name: t for group in groups for t in group.trajectories if t.name in names}
        parts = {index: part for update in updates for index, part in update.tokens.items()}
        everyone: list[Any] = [(mine, parts)]
        if self._layout.world_size > 1:
            everyone = [None] * self._layout.world_size if self._layout.rank == 0 else []
            dist.gather_object((mine, parts), everyone or None, dst=0, group=self._group)
        if self._layout.rank != 0:
            return [], []
        rows = self._rows(step, names, batch, everyone)
        return [rows[name] for name in kept], [rows[name] for name in shown]

    def _rows(self, step: int, names: Sequence[str], batch: Batch, everyone: Sequence[Any]) -> dict[str, Any]:
        trajectories = {name: t for mine, _ in everyone for name, t in mine.items()}
        found: list[dict[int, TokenPart]] = [parts for _, parts in everyone]
        rows = {}
        for name in names:
            index, trajectory = batch.names.index(name), trajectories[name]
            update = next((n for n, members in enumerate(batch.mini_batches) if index in members), -1)
            row = row_of(trajectory, step, update, self._inputs.tokenizer.decode)
            if parts := [part[index] for part in found if index in part]:
                row["tokens"] = token_columns(trajectory, parts, self._inputs.tokenizer.decode)
            rows[name] = row
        return rows

    def rates(
        self,
        sampled: SampledGroups | None,
        batch: Batch,
        updates: Sequence[UpdateMetrics],
        seconds: Mapping[str, float],
    ) -> dict[str, float | None]:
        """Tokens per second and the like of a step."""
        generated = None if sampled is None or self._config.run.replay else sampled.statistics.get("tokens_sampled", 0)
        passes = TRAINING if self._config.algorithm.kind == "sft" else FORWARD + TRAINING
        passes += FORWARD * bool(self._config.algorithm.kl_coef)
        return throughput(
            generated=generated,
            generating=sampled.seconds if sampled is not None else 0.0,
            trained=sum(batch.lengths) if updates else 0,
            training=seconds.get("log_probs", 0.0) + seconds.get("update", 0.0),
            step=seconds["step"],
            flops=passes * model_flops(self._inputs.architecture, batch.lengths),
            peak=self._peak,
        )
