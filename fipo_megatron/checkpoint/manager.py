"""Checkpoints of a run: everything that the rest of it depends on, published as a whole.

``checkpoints/step-000020`` is what a run needs to begin with step 20: weights and
optimizer (:mod:`.actor.sharded_checkpoint`, :mod:`.actor.optimizer_state`), and below ``run/`` the manifest, what each
leader's sampler carries, and the random generators of every rank. All files stand in ``checksums.json``.
"""

from __future__ import annotations

import io
import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fipo_megatron.actor import sharded_checkpoint
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.optimizer_state import content, fill_optimizer, optimizer_shards, optimizer_tensors
from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.config import Config, as_dict
from fipo_megatron.rollout import carry_over, rollout_dump
from fipo_megatron.rollout.carry_over import Carried
from fipo_megatron.rollout.sampler import SampledGroups
from fipo_megatron.storage.atomic import partial_of, set_aside
from fipo_megatron.testing import fail_points
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger(__name__)
_BYTES_OF_OPTIMIZER = 12
"""Per parameter: main parameter and two moments in float32."""
_TIMEOUT = timedelta(hours=2)
"""The fastest rank waits for the slowest to write its share."""


@dataclass(frozen=True)
class TrainState:
    """Where a run is.

    Attributes:
        step: The next one.
        cursor: Of the prompts.
        roll_backs: How often it has returned to an earlier checkpoint.
        learning_rate_factor: Of these returns.
    """

    step: int
    cursor: int
    roll_backs: int = 0
    learning_rate_factor: float = 1.0


class CheckpointManager:
    """Those of a run, on this rank. All methods are collectives of all ranks, which must see one file system.

    Args:
        directory: Where they are; made if it does not exist.
        config: Of the run.
        actor: To save and to fill.
        architecture: Of the model.
    """

    def __init__(self, directory: Path, config: Config, actor: MegatronActor, architecture: Architecture) -> None:
        self._directory, self._config = directory, config
        self._actor, self._architecture, self._layout = actor, architecture, actor.layout
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        with raise_on_all_ranks("opening the directory of checkpoints"):
            if self._layout.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                for left in directory.glob(".*.partial"):  # of a run that was killed while it saved
                    logger.warning("%s: was never finished; removed", left)
                    shutil.rmtree(left)

    def save(
        self,
        place: TrainState,
        carried: Carried | None,
        ahead: SampledGroups | None,
        scores: Mapping[int, float],
        safe: int | None = None,
    ) -> None:
        """Starts to write a checkpoint; with ``checkpoint.async_save``, a thread finishes it.

        Args:
            place: Where the run is.
            carried: By the sampler of this rank; None where it does not lead.
            ahead: What was sampled for this step already; None where nothing was.
            scores: By step, to tell the best checkpoint, which stays.
            safe: The newest checkpoint of this step or an earlier one stays, too: the run may have to return to it. So
                does the next one: a later alarm will need it, when more than ``checkpoint.keep_last`` are newer.

        Raises:
            OSError: the disk is full, and the like, also of the checkpoint before this one; nothing is left under the
                final name.
        """
        self.finish()
        sharding = self._config.checkpoint.optimizer_sharding
        everyone: list[bool] = [False] * self._layout.world_size
        dist.all_gather_object(everyone, carried is not None)
        leaders = [rank for rank, leads in enumerate(everyone) if leads]
        with raise_on_all_ranks("saving a checkpoint"):
            self._check_space()
        staged = sharded_checkpoint.stage(
            self._actor.chunks,
            more=lambda: {"optimizer": optimizer_shards(self._actor, sharding, loading=False)},
            content=content(sharding),
            live=optimizer_tensors(self._actor) if self._config.checkpoint.async_save else None,
        )
        generators = io.BytesIO()
        torch.save(_random_state(), generators)
        files = {f"random-{self._layout.rank}.pt": generators.getvalue()}
        if carried is not None:
            files[f"sampler-{leaders.index(self._layout.rank)}.npz"] = carry_over.serialize_groups(*carried)
        if ahead is not None:
            files |= rollout_dump.files(place.step, self._layout.rank, ahead)
        described = self._manifest(place, len(leaders), sampled_ahead=ahead is not None)
        self._writing = self._thread.submit(
            self._write, place.step, staged, files, described, lambda: self._prune(scores, safe)
        )
        if not self._config.checkpoint.async_save:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> None:
        """Waits for what is being written; see :meth:`save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits, where the run has failed elsewhere: what is being written is whole, and is kept."""
        try:
            self.finish()
        except Exception as error:
            logger.error("the last checkpoint could not be written: %s", error)
        self._thread.shutdown()

    def _write(
        self,
        step: int,
        staged: sharded_checkpoint.Staged,
        files: Mapping[str, bytes],
        described: Manifest,
        prune: Callable[[], None],
    ) -> None:
        """In a thread, with a group of its own: the run's collectives go on meanwhile."""

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
            self._directory / manifest.name_of(step),
            write_more=write_more,
            verify=lambda partial: fail_points.reach("checkpoint_publish"),
            group=self._group,
        )
        fail_points.reach("checkpoint_published")
        prune()

    def _manifest(self, place: TrainState, leaders: int, *, sampled_ahead: bool) -> Manifest:
        return Manifest(
            step=place.step,
            cursor=place.cursor,
            roll_backs=place.roll_backs,
            learning_rate_factor=place.learning_rate_factor,
            leaders=leaders,
            sampled_ahead=sampled_ahead,
            world_size=self._layout.world_size,
            parallel=asdict(self._config.actor.parallel),
            schedule=manifest.plain(self._actor.schedule.state_dict()),
            skipped_steps=self._actor.skipped_steps,
            architecture=manifest.describe_architecture(self._architecture),
            config=as_dict(self._config),
            packages=manifest.package_versions(),
        )

    def _check_space(self) -> None:
        """Raises OSError where the file system has too little room."""
        parameters = sum(prod(shape) for shape in tables.hf_tensors(self._architecture).values())
        needed = parameters * (getattr(torch, self._config.actor.dtype).itemsize + _BYTES_OF_OPTIMIZER)
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(
                f"{self._directory}: {free / 1e9:.1f} GB are free, a checkpoint needs about {needed / 1e9:.1f} GB"
            )

    def _prune(self, scores: Mapping[int, float], safe: int | None) -> None:
        """Removes all but those :func:`steps_to_keep`."""
        with raise_on_all_ranks("removing old checkpoints", self._group):
            if self._layout.rank == 0:
                found = manifest.list_checkpoints(self._directory)
                kept = steps_to_keep([step for step, _ in found], self._config.checkpoint.keep_last, scores, safe)
                for step, path in found:
                    if step not in kept:
                        hidden = partial_of(path)
                        path.rename(hidden)
                        shutil.rmtree(hidden)

    @property
    def directory(self) -> Path:
        """Where they are."""
        return self._directory

    def newest(self, until: float = math.inf) -> Path | None:
        """The newest one whose files are whole; those that are not are named, loudly.

        Args:
            until: Its step is not larger.

        Raises:
            WeightsError: there are some, but none is whole.
        """
        found: list[Any] = [None]
        if self._layout.rank == 0:
            found = [[str(path) for step, path in manifest.list_checkpoints(self._directory) if step <= until]]
        dist.broadcast_object_list(found, src=0, device=self._layout.device)
        for name in found[0]:
            try:
                sharded_checkpoint.verify_checksums(Path(name), self._layout, must_have=(manifest.FILE,))
            except WeightsError as error:
                logger.error("CHECKPOINT %s IS DAMAGED, the one before it is used:\n%s", name, error)
                self._set_aside(Path(name))
                continue
            return Path(name)
        if found[0]:
            raise WeightsError(f"{self._directory}: none of {len(found[0])} checkpoints is whole")
        return None

    def _set_aside(self, path: Path) -> None:
        """Renames it, so that its step can be saved again; nothing is removed."""
        with raise_on_all_ranks("setting a damaged checkpoint aside"):
            if self._layout.rank == 0:
                logger.error("it is %s now", set_aside(path, "damaged"))

    def load(self, path: Path) -> tuple[Manifest, list[Carried], SampledGroups | None]:
        """Fills the actor.

        Returns:
            The manifest, what each leader's sampler carried, and what was sampled ahead.

        Raises:
            WeightsError: it does not hold this model.
        """
        saved = Manifest.read(path)
        sharding = saved.config["checkpoint"]["optimizer_sharding"]
        found = sharded_checkpoint.load(
            self._actor.chunks,
            self._architecture,
            self._layout,
            path,
            more=lambda: {"optimizer": optimizer_shards(self._actor, sharding, loading=True)},
            verified=True,
        )
        fill_optimizer(self._actor, found["optimizer"])
        self._actor.schedule.num_steps = 0  # what is loaded is added
        self._actor.schedule.load_state_dict(saved.schedule)
        self._actor.skipped_steps = saved.skipped_steps
        same = saved.parallel == manifest.plain(asdict(self._config.actor.parallel))
        if same and saved.world_size == self._layout.world_size:
            _restore_random_state(torch.load(path / "run" / f"random-{self._layout.rank}.pt", weights_only=True))
        else:
            logger.warning("%s was saved under another layout: random generators begin anew", path)
        if changed := manifest.differences(saved.config, as_dict(self._config)):
            logger.warning("%s was saved with another configuration:\n  %s", path, "\n  ".join(changed))
        files = [path / "run" / f"sampler-{leader}.npz" for leader in range(saved.leaders)]
        carried = [carry_over.deserialize_groups(file.read_bytes()) for file in files]
        ahead = None
        if saved.sampled_ahead:
            ahead = rollout_dump.read(path / "run", saved.step, keep=self._layout.rank == 0)
        return saved, carried, ahead


def steps_to_keep(steps: Sequence[int], newest: int, scores: Mapping[int, float], safe: int | None) -> set[int]:
    """Of the checkpoints of these steps: so many of the newest, the best, and those that the run may have to return to.

    Args:
        steps: Of all that there are.
        newest: How many.
        scores: By step; empty where the best is not wanted.
        safe: A checkpoint of this step or an earlier one is from before any collapse. The newest such one is kept, and
            the one after it: ``safe`` grows, and by the time it gets there, ``newest`` ones may be newer.
    """
    kept = {*sorted(steps)[-newest:]}
    kept |= {*sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))[-1:]}
    if safe is not None:
        kept |= {*sorted(step for step in steps if step <= safe)[-1:]}
        kept |= {*sorted(step for step in steps if step > safe)[:1]}
    return kept


def _random_state() -> dict[str, Any]:
    """Of every generator of this process, as tensors and lists."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the one that libraries draw from
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "tracker": dict(get_cuda_rng_tracker().get_states()),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
