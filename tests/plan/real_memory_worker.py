"""Counts the memory of real ranks under every layout of a world size: ``main OUT.json``."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import router
from torch import Tensor

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.plan.memory_count import measure
from tests.plan.memory_cases import CASES, configuration, real_mini_batch


def in_turn(logits: Tensor) -> Tensor:
    """Returns logits by which all experts get the same number of tokens on every rank, as the plan assumes.

    Takes the place of Megatron's random logits: gloo gathers equal parts only.
    """
    tokens, experts = logits.flatten(0, -2).shape
    chosen = (2 * torch.arange(tokens)[:, None] + torch.arange(2)) % experts
    return logits * 0 + torch.zeros(tokens, experts).scatter_(1, chosen, 1.0).view_as(logits)


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    router.apply_random_logits = in_turn
    found = {}
    for name, case in CASES[int(os.environ["WORLD_SIZE"])].items():
        config, architecture = configuration(*case)
        layout = parallel.initialize(config.actor.parallel, 1)
        actor = MegatronActor(config, architecture, layout, lambda chunks: None)
        actor.chunks[0].config.moe_router_force_load_balancing = True
        mine = measure(actor, *real_mini_batch(case[0], layout.data_size))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, asdict(mine))
        parallel.destroy()
        found[name] = everyone
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(found))
