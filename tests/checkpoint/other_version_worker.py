"""A run that resumes, trains on, and hashes its state on the way: ``run HASHES.json CONFIG.yaml [key=value ...]``.

The hashes are those of the shards of every rank, under the names that they have in a checkpoint: weights, main
parameters and moments; and of the schedule with the rates of all parameter groups.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from fipo_megatron.actor.optimizer_state import optimizer_shards
from fipo_megatron.actor.sharded_checkpoint import sharded_weights
from fipo_megatron.config import load_config
from fipo_megatron.train import train
from fipo_megatron.trainer.factory import open_trainer
from fipo_megatron.trainer.trainer import Trainer
from fipo_megatron.trainer.training_inputs import read_training_inputs


def shards(state: Any) -> Iterator[ShardedTensor]:
    """Yields the tensors of a nested state."""
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from shards(part)


def hashes(trainer: Trainer) -> dict[str, str]:
    """Returns the SHA-256 of the bytes of each shard of this rank, and what the next step depends on as text."""
    actor = trainer.actor
    sharding = trainer.config.checkpoint.optimizer_sharding
    optimizer = optimizer_shards(actor, sharding, loading=False)
    apply_factories(optimizer)
    found = {}
    for shard in (*shards(sharded_weights(actor.chunks)), *shards(optimizer)):
        content = shard.data.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{shard.key} at {shard.global_offset}"] = hashlib.sha256(content).hexdigest()
    inner = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    rates = [(group["lr"], group["weight_decay"]) for each in inner for group in each.optimizer.param_groups]
    schedule = actor.schedule.state_dict()
    return found | {"schedule": repr([schedule, rates]), "run": repr([trainer.step, trainer.prompts.given])}


def main(results: str, *arguments: str) -> None:
    """Opens the run, which resumes it if there is a checkpoint, trains the remaining steps, and writes the hashes."""
    warnings.simplefilter("ignore")
    config = load_config(arguments[0], arguments[1:])
    with open_trainer(config, read_training_inputs(config)) as trainer:
        opened = hashes(trainer)
        assert train(trainer)
        found = {"version": metadata.version("megatron-core"), "opened": opened, "trained": hashes(trainer)}
        Path(f"{results}-{trainer.layout.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
