"""Disk space that a run takes: checkpoints, exports and weights on their way to the servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from fipo_megatron.config import Config

OPTIMIZER_BYTES = 12
"""Bytes of optimizer state per parameter: main parameter and two moments in float32."""

_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_FOR_ROLLBACK = 2
"""Checkpoints that :func:`.retention.steps_to_keep` keeps for the collapse alarm, beside the newest."""


def checkpoint_bytes(architecture: Architecture, dtype: str) -> int:
    """Returns the bytes of a checkpoint: weights in ``actor.dtype``, main parameters and moments."""
    return tables.parameter_count(architecture) * (_ITEM_BYTES[dtype] + OPTIMIZER_BYTES)


def export_bytes(architecture: Architecture, dtype: str) -> int:
    """Returns the bytes of the weights of a Hugging Face export in ``actor.dtype``."""
    return tables.parameter_count(architecture) * _ITEM_BYTES[dtype]


@dataclass(frozen=True)
class DiskSpace:
    """Disk space of a run in bytes; logs, metrics and texts are small beside it.

    Attributes:
        checkpoint: One checkpoint.
        kept_checkpoints: Largest number of checkpoints that exist at a time, the one that is being written included.
        export: One export.
        exports: Exports in the end, the final one included.
        sent_weights: Weights on their way to the servers (``rollout.servers.sync = disk``).
        trajectories: Limit of the trajectory files.
    """

    checkpoint: int
    kept_checkpoints: int
    export: int
    exports: int
    sent_weights: int
    trajectories: int

    @property
    def total(self) -> int:
        """Largest number of bytes at a time."""
        return (
            self.checkpoint * self.kept_checkpoints + self.export * self.exports + self.sent_weights + self.trajectories
        )

    @classmethod
    def of_run(cls, config: Config, architecture: Architecture) -> DiskSpace:
        """Returns the space of a whole run."""
        checkpoint, run = config.checkpoint, config.run
        saves = 1 if not checkpoint.save_every else -(-run.steps // checkpoint.save_every)
        best = checkpoint.keep_best and run.evaluate_every > 0
        watched = config.health.action != "off"
        kept = checkpoint.keep_last + best + (_FOR_ROLLBACK if watched else 0)
        exports = 1 + ((run.steps - 1) // checkpoint.export_every if checkpoint.export_every else 0)
        export = export_bytes(architecture, config.actor.dtype)
        by_disk = config.rollout.engine == "sglang" and config.rollout.servers.sync == "disk"
        sends = by_disk and config.algorithm.kind != "sft" and not run.replay
        return cls(
            checkpoint=checkpoint_bytes(architecture, config.actor.dtype),
            kept_checkpoints=min(saves, kept + 1),
            export=export,
            exports=exports,
            sent_weights=2 * export if sends else 0,
            trajectories=int(config.observe.trajectory_mib * 2**20) if config.observe.trajectories else 0,
        )
