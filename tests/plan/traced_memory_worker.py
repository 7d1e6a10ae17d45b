"""Traces every rank of every layout of a world size in one process: ``main WORLD_SIZE OUT.json``."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

from fipo_megatron.plan.trace import trace_rank
from tests.plan.memory_cases import CASES, configuration, micro_batches


def main(world_size: str, out: str) -> None:
    warnings.simplefilter("ignore")
    ranks = range(world := int(world_size))
    found = {
        name: [asdict(trace_rank(*configuration(*case), rank, world, micro_batches(case[0]), "cpu")) for rank in ranks]
        for name, case in CASES[world].items()
    }
    Path(out).write_text(json.dumps(found))
