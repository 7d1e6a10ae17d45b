"""Saves, restores and prunes the checkpoints of a run; each is published as a whole.

``checkpoints/step-000020`` holds everything that a run needs to resume with step 20: weights and optimizer
(:mod:`.actor.sharded_checkpoint`, :mod:`.actor.optimizer_state`), and below ``run/`` the manifest, the carry-over of
each leader's sampler, and the random generator states of every rank. ``checksums.json`` lists all files.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fipo_megatron.actor import sharded_checkpoint
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.optimizer_state import content, fill_optimizer, optimizer_shards, optimizer_tensors
from fipo_megatron.checkpoint import manifest, replacement
from fipo_megatron.checkpoint.damage import (
    VALUE_ERRORS,
    check_listed,
    damage_in,
    damage_on_all_ranks,
    read_manifest,
    remove,
    remove_unfinished,
)
from fipo_megatron.checkpoint.disk_space import checkpoint_bytes
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.checkpoint.random_state import random_state_bytes, read_random_state, restore_random_state
from fipo_megatron.checkpoint.retention import steps_to_keep
from fipo_megatron.config import Config, as_dict
from fipo_megatron.rollout import carry_over, rollout_dump
from fipo_megatron.rollout.carry_over import Carried
from fipo_megatron.rollout.sampler import SampledGroups
from fipo_megatron.storage.atomic import set_aside
from fipo_megatron.testing import fail_points
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger(__name__)
_TIMEOUT = timedelta(hours=2)
"""Time limit of a collective of the writing threads: the fastest rank waits for the slowest to write its part."""


@dataclass(frozen=True)
class TrainState:
    """The position of a run.

    Attributes:
        step: The next step.
        cursor: Number of prompts consumed so far.
        rollbacks: Number of rollbacks so far.
        learning_rate_factor: Product of the learning-rate factors of these rollbacks.
    """

    step: int
    cursor: int
    rollbacks: int = 0
    learning_rate_factor: float = 1.0


@dataclass(frozen=True)
class Restored:
    """The content of a checkpoint apart from the actor.

    Attributes:
        manifest: The manifest.
        carry_over: Carry-over of each leader's sampler, by leader.
        prefetched: Groups that were sampled for the step to resume with; None if there are none.
    """

    manifest: Manifest
    carry_over: Sequence[Carried] = ()
    prefetched: SampledGroups | None = None


class CheckpointManager:
    """The checkpoints of a run, on this rank. All ranks share a file system.

    :meth:`save`, :meth:`newest` and :meth:`load` are collectives of all ranks.

    Args:
        directory: Directory of the checkpoints; created if it does not exist.
        config: Configuration of the run.
        actor: Actor to save and to restore.
        architecture: Architecture of the model.
        data: SHA-256 of each training file by its path, on rank 0; other ranks need none.

    Attributes:
        directory: Directory of the checkpoints.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        actor: MegatronActor,
        architecture: Architecture,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._data = dict(data or {})
        self._config, self._actor, self._architecture = config, actor, architecture
        self._layout = actor.layout
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        with raise_on_all_ranks("opening the directory of checkpoints"):
            if self._layout.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                remove_unfinished(directory)
                replacement.complete_exchanges(directory)

    def save(
        self,
        state: TrainState,
        carried: Carried | None,
        prefetched: SampledGroups | None,
        scores: Mapping[int, float],
        safe_step: int | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Starts to write a checkpoint; with ``checkpoint.async_save``, a thread finishes it.

        Args:
            state: Position of the run.
            carried: Carry-over of this rank's sampler; None if the rank is no leader.
            prefetched: Groups that are already sampled for the next step; None if there are none.
            scores: Evaluation accuracy by step; the best checkpoint is kept.
            safe_step: See :func:`.retention.steps_to_keep`.
            replace: Whether an earlier checkpoint of the same step is replaced.

        Raises:
            FileExistsError: There is a checkpoint of this step, and ``replace`` is false.
            OSError: The disk is full or cannot be written; also if that happened to the checkpoint before this one.
                Nothing is left under the final name.
        """
        self.finish()
        sharding = self._config.checkpoint.optimizer_sharding
        target = self.directory / manifest.name_of(state.step)
        everyone: list[tuple[bool, bool]] = [(False, False)] * self._layout.world_size
        dist.all_gather_object(everyone, (carried is not None, os.path.lexists(target)))
        leaders = [rank for rank, (leads, _) in enumerate(everyone) if leads]
        if replace and everyone[0][1]:
            target = replacement.path_of(self.directory, state.step)
        with raise_on_all_ranks("saving a checkpoint"):
            self._check_space()
        staged = sharded_checkpoint.stage(
            self._actor.chunks,
            more=lambda: {"optimizer": optimizer_shards(self._actor, sharding, loading=False)},
            content=content(sharding),
            live=optimizer_tensors(self._actor) if self._config.checkpoint.async_save else None,
        )
        files = {f"random-{self._layout.rank}.pt": random_state_bytes()}
        if carried is not None:
            files[f"sampler-{leaders.index(self._layout.rank)}.npz"] = carry_over.serialize_groups(*carried)
        if prefetched is not None:
            files |= rollout_dump.files(state.step, self._layout.rank, prefetched)
        described = self._manifest(state, len(leaders), prefetched=prefetched is not None)
        self._writing = self._thread.submit(
            self._write, target, staged, files, described, lambda: self._prune(scores, safe_step)
        )
        if not self._config.checkpoint.async_save:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> None:
        """Waits until the checkpoint in progress is written; raises what :meth:`save` documents."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a block in which nothing is written; it begins when the checkpoint in progress is done."""
        if self._writing is not None:
            wait([self._writing])
        yield

    def close(self) -> None:
        """Waits for the checkpoint in progress, logs its failure if it fails, and ends the thread."""
        try:
            self.finish()
        except Exception as error:
            logger.error("the last checkpoint could not be written: %s", error)
        self._thread.shutdown()

    def newest(self, until: float = math.inf) -> Path | None:
        """Returns the newest checkpoint whose files are whole; sets damaged ones aside and logs them.

        Args:
            until: Largest step to consider.

        Raises:
            WeightsError: There are checkpoints, but none is whole.
        """
        found: list[Any] = [None]
        if self._layout.rank == 0:
            found = [[str(path) for step, path in manifest.list_checkpoints(self.directory) if step <= until]]
        dist.broadcast_object_list(found, src=0, device=self._layout.device)
        for name in found[0]:
            try:
                self._verify(Path(name))
            except WeightsError as error:
                self.set_aside(Path(name), error)
                continue
            return Path(name)
        if found[0]:
            raise WeightsError(f"{self.directory}: none of {len(found[0])} checkpoints is whole")
        return None

    def load(self, path: Path) -> Restored:
        """Restores the actor, and on the layout that saved it also the random generators.

        Returns:
            The rest of the checkpoint.

        Raises:
            WeightsError: The checkpoint is damaged or does not hold this model; on all ranks. The actor may hold a part
                of it.
        """
        with damage_on_all_ranks():
            return self._load(path)

    def set_aside(self, path: Path, error: WeightsError) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again, and logs why. A collective."""
        with raise_on_all_ranks("setting a damaged checkpoint aside"):
            if self._layout.rank == 0:
                logger.error("CHECKPOINT %s IS DAMAGED, the one before it is used:\n%s", path, error)
                logger.error("it is %s now", set_aside(path, "damaged"))

    def _verify(self, path: Path) -> None:
        """Raises WeightsError on all ranks if a checkpoint is not whole. A collective."""
        with damage_on_all_ranks():
            with raise_on_all_ranks("verifying a checkpoint"):
                saved = read_manifest(path)  # alone first: it is small, and says which files there must be
            sharded_checkpoint.verify_checksums(path, self._layout)
            with raise_on_all_ranks("verifying a checkpoint"):
                if self._layout.rank == 0:
                    check_listed(path, saved)

    def _load(self, path: Path) -> Restored:
        """Restores a checkpoint; raises WeightsError on the ranks that find damage. A collective."""
        with raise_on_all_ranks("reading a checkpoint"):
            saved = read_manifest(path)
            same_parallel = saved.parallel == manifest.plain(asdict(self._config.actor.parallel))
            same_layout = same_parallel and saved.world_size == self._layout.world_size
            own_random = path / "run" / f"random-{self._layout.rank}.pt"
            random_state = read_random_state(own_random) if same_layout else None
            restored = self._read_carry_over(path, saved)
        sharding = saved.config["checkpoint"]["optimizer_sharding"]
        found = sharded_checkpoint.load(
            self._actor.chunks,
            self._architecture,
            self._layout,
            path,
            more=lambda: {"optimizer": optimizer_shards(self._actor, sharding, loading=True)},
            verified=True,
        )
        with raise_on_all_ranks("restoring the optimizer"), damage_in(path, VALUE_ERRORS):
            fill_optimizer(self._actor, found["optimizer"])
            self._actor.schedule.num_steps = 0  # load_state_dict adds the saved number of steps
            self._actor.schedule.load_state_dict(saved.schedule)
        self._actor.skipped_steps = saved.skipped_steps
        if random_state is not None:
            restore_random_state(random_state)
        else:
            logger.warning("%s was saved under another layout: random generators begin anew", path)
        changed = manifest.differences(saved.config, as_dict(self._config), as_dict(Config()))
        longer = [line for line in changed if line.startswith("run.steps: ")]
        if longer:  # another length is how a run is extended
            logger.info("%s", longer[0])
        if changed := [line for line in changed if line not in longer]:
            logger.warning("%s was saved with another configuration:\n  %s", path, "\n  ".join(changed))
        self._warn_of_changed_data(path, saved)
        return restored

    def _warn_of_changed_data(self, path: Path, saved: Manifest) -> None:
        """Warns of each training file whose content is another one than when the checkpoint was saved."""
        text = (
            "%s: has changed since %s was saved. Position %d counts in its new order: prompts may repeat or be left out"
        )
        for name, digest in sorted(saved.data.items()):
            if self._data.get(name, digest) != digest:
                logger.warning(text, name, path, saved.cursor)

    def _read_carry_over(self, path: Path, saved: Manifest) -> Restored:
        """Reads what the samplers had carried over and prefetched.

        Raises:
            WeightsError: A file is missing or damaged.
        """
        carried, prefetched = [], None
        for file in (path / "run" / f"sampler-{leader}.npz" for leader in range(saved.leaders)):
            with damage_in(file):
                carried.append(carry_over.deserialize_groups(file.read_bytes()))
        if saved.prefetched:
            with damage_in(path / "run"):
                prefetched = rollout_dump.read(path / "run", saved.step, keep=self._layout.rank == 0)
        return Restored(saved, carried, prefetched)

    def _write(
        self,
        target: Path,
        staged: sharded_checkpoint.Staged,
        files: Mapping[str, bytes],
        described: Manifest,
        prune: Callable[[], None],
    ) -> None:
        """Writes and publishes a checkpoint in a thread, whose own group leaves the run's collectives undisturbed."""

        def write_more(partial: Path) -> None:
            fail_points.reach("checkpoint_write")
            (partial / "run").mkdir(exist_ok=True)
            for name, written in files.items():
                (partial / "run" / name).write_bytes(written)
            if self._layout.rank == 0:
                described.write(partial)

        sharded_checkpoint.write(
            staged,
            self._layout,
            self._config.model.path,
            target,
            write_more=write_more,
            verify=lambda partial: fail_points.reach("checkpoint_publish"),
            group=self._group,
        )
        fail_points.reach("checkpoint_published")
        if target.suffix:
            with raise_on_all_ranks("replacing a checkpoint", self._group):
                if self._layout.rank == 0:
                    replacement.exchange(target)
        prune()

    def _manifest(self, state: TrainState, leaders: int, *, prefetched: bool) -> Manifest:
        return Manifest(
            step=state.step,
            cursor=state.cursor,
            rollbacks=state.rollbacks,
            learning_rate_factor=state.learning_rate_factor,
            leaders=leaders,
            prefetched=prefetched,
            world_size=self._layout.world_size,
            parallel=asdict(self._config.actor.parallel),
            schedule=manifest.plain(self._actor.schedule.state_dict()),
            skipped_steps=self._actor.skipped_steps,
            architecture=manifest.describe_architecture(self._architecture),
            config=as_dict(self._config),
            packages=manifest.package_versions(),
            data=self._data,
        )

    def _check_space(self) -> None:
        """Raises OSError if the file system has too little free space for a checkpoint."""
        needed = checkpoint_bytes(self._architecture, self._config.actor.dtype)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"{self.directory}: {free / 1e9:.1f} GB are free, a checkpoint needs about {needed / 1e9:.1f} GB"
            )

    def _prune(self, scores: Mapping[int, float], safe_step: int | None) -> None:
        """Removes all checkpoints but those that :func:`.retention.steps_to_keep` returns."""
        with raise_on_all_ranks("removing old checkpoints", self._group):
            if self._layout.rank == 0:
                found = manifest.list_checkpoints(self.directory)
                kept = steps_to_keep([step for step, _ in found], self._config.checkpoint.keep_last, scores, safe_step)
                for step, path in found:
                    if step not in kept:
                        remove(path)
