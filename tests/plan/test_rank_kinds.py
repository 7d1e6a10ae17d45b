"""Which pipeline stages stand for which."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.config import ParallelConfig
from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.weights.architecture import Architecture

DENSE = Architecture.from_hf(json.loads(Path("tests/weights/configs/Qwen2.5-32B.json").read_text()))
SPARSE = Architecture.from_hf(json.loads(Path("tests/weights/configs/Qwen3-30B-A3B.json").read_text()))


def stages(architecture, world_size=128, **sizes):
    return [(kind.stages, kind.rank) for kind in rank_kinds(architecture, ParallelConfig(**sizes), world_size)]


def test_first_last_and_between():
    assert stages(DENSE, pipeline_parallel=8) == [((0,), 0), ((1, 2, 3, 4, 5, 6), 16), ((7,), 112)]
    assert stages(DENSE, pipeline_parallel=2) == [((0,), 0), ((1,), 64)]
    assert stages(DENSE) == [((0,), 0)]


def test_stages_with_other_layers_are_another_kind():
    first_layers = tuple(layer >= 24 for layer in range(48))  # the first half is dense
    mixed = replace(SPARSE, mixture=replace(SPARSE.mixture, layers=first_layers))
    assert [found for found, _ in stages(mixed, pipeline_parallel=8)] == [(0,), (1, 2, 3), (4, 5, 6), (7,)]
    # Interleaved stages have layers of both halves.
    assert [found for found, _ in stages(mixed, pipeline_parallel=8, virtual_pipeline=2)] == [
        (0,),
        (1, 2, 3, 4, 5, 6),
        (7,),
    ]


@pytest.mark.parametrize(("sizes", "count"), [({}, 1), ({"pipeline_parallel": 4}, 4)])
def test_micro_batches_fill_the_pipeline(sizes, count):
    assert {kind.micro_batches for kind in rank_kinds(DENSE, ParallelConfig(**sizes), 64)} == {count}
    interleaved = ParallelConfig(pipeline_parallel=4, virtual_pipeline=2)
    # Megatron starts 2 (p - 1) + (v - 1) p + 1 = 11 of m v passes before the first backward pass.
    assert {kind.micro_batches * 2 >= 11 for kind in rank_kinds(DENSE, interleaved, 64)} == {True}
