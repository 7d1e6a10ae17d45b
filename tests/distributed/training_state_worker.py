"""Saves weights and optimizer under one layout, loads them under each, and takes the next step, on two ranks."""

from __future__ import annotations

import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fipo_megatron.actor import parallel, sharded_checkpoint
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.actor.optimizer_state import content, fill_optimizer, optimizer_shards, optimizer_tensors
from fipo_megatron.config import Config, ParallelConfig
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.weights.architecture import Architecture

LAYOUTS = {
    "DP2": ParallelConfig(),
    "TP2": ParallelConfig(tensor_parallel=2),
    "PP2": ParallelConfig(pipeline_parallel=2),
}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "distributed_optimizer": False},
    "float32, distributed": {"dtype": "float32", "distributed_optimizer": True},
    "bfloat16, distributed": {"dtype": "bfloat16", "distributed_optimizer": True},
    "bfloat16": {"dtype": "bfloat16", "distributed_optimizer": False},
}
RESHARDED_BY_DATA = "float32, distributed, dp_reshardable"
"""Optimizer sharding that loads only under the same tensor- and pipeline-parallel sizes."""
ALL_KINDS = KINDS | {RESHARDED_BY_DATA: KINDS["float32, distributed"]}


def trajectory(number: int) -> Trajectory:
    random = np.random.default_rng(number)
    length = int(random.integers(5, 20))
    return Trajectory(
        Prompt(str(number), random.integers(2, 61, 5), ""),
        sample=0,
        tokens=random.integers(2, 61, length),
        behaviour_log_probs=-random.random(length).astype(np.float32),
        mask=np.ones(length, np.bool_),
        advantage=float(random.normal()),
    )


def learn(actor: MegatronActor, step: int) -> list[list[float]]:
    """Returns loss and gradient norm of two updates."""
    batch = [trajectory(8 * step + number) for number in range(8)]
    plan = actor.plan([len(t) for t in batch], [range(4), range(4, 8)])
    return [[m.loss, m.grad_norm] for m in actor.update(plan, batch, actor.log_probs(plan, batch))]


def build(base: Config, kind: str, name: str) -> tuple[MegatronActor, Architecture, parallel.RankLayout]:
    config = replace(base, actor=replace(base.actor, parallel=LAYOUTS[name], **ALL_KINDS[kind]))
    layout = parallel.initialize(LAYOUTS[name], seed=1)
    architecture = Architecture.from_directory(config.model.path)
    path = config.model.path
    return (
        MegatronActor(config, architecture, layout, lambda c: load_hf(c, architecture, layout, path)),
        (architecture),
        layout,
    )


def main(config_json: str, directory: str) -> None:
    from pydantic import TypeAdapter

    warnings.simplefilter("ignore")
    base = TypeAdapter(Config).validate_json(config_json)
    found = []
    for kind in ALL_KINDS:
        sharding = "dp_reshardable" if kind == RESHARDED_BY_DATA else "fully_reshardable"
        for saved in LAYOUTS:
            actor, _, layout = build(base, kind, saved)
            learn(actor, 0)
            path = Path(directory, f"{kind}-{saved}".replace(", ", "-"))
            staged = sharded_checkpoint.stage(
                actor.chunks,
                more=lambda a=actor, s=sharding: {"optimizer": optimizer_shards(a, s, loading=False)},
                content=content(sharding),
                live=optimizer_tensors(actor),
            )
            group = dist.new_group(backend="gloo")
            with ThreadPoolExecutor(1) as thread:  # written while the run goes on: what was staged must not change
                writing = thread.submit(sharded_checkpoint.write, staged, layout, base.model.path, path, group=group)
                expected = learn(actor, 1)
                writing.result()
            parallel.destroy()
            for loaded in [saved] if kind == RESHARDED_BY_DATA else LAYOUTS:
                actor, architecture, layout = build(base, kind, loaded)
                state = sharded_checkpoint.load(
                    actor.chunks,
                    architecture,
                    layout,
                    path,
                    more=lambda a=actor, s=sharding: {"optimizer": optimizer_shards(a, s, loading=True)},
                )
                fill_optimizer(actor, state["optimizer"])
                actor.schedule.step(2)
                found.append(
                    {"kind": kind, "saved": saved, "loaded": loaded, "expected": expected, "found": learn(actor, 1)}
                )
                parallel.destroy()
    Path(directory, "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
