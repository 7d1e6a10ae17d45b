"""The check that the actor fits the GPU, which a run makes before process groups exist."""

import json
import logging
from pathlib import Path

import pytest

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import ActorConfig, Config, DataConfig, ParallelConfig, RewardConfig, RolloutConfig
from fipo_megatron.trainer import memory_check
from fipo_megatron.weights.architecture import Architecture

GIB = 2**30
MODEL = Architecture.from_hf(json.loads(Path("tests/weights/configs/Qwen2.5-0.5B.json").read_text()))
CONFIG = Config(
    actor=ActorConfig(token_budget=4096, parallel=ParallelConfig(pipeline_parallel=2)),
    data=DataConfig(max_prompt_tokens=512),
    rollout=RolloutConfig(max_response_tokens=3584),
    reward=RewardConfig(overlong_buffer_tokens=0),
)


def problem(rank, gpu_bytes):
    launch = Launch(rank, 4, rank, "localhost", 1)
    return memory_check.memory_problem(CONFIG, MODEL, launch, gpu_bytes, transformer_engine=True)


@pytest.mark.processes
def test_what_cannot_fit_is_refused_with_the_numbers():
    found = problem(2, 6 * GIB)
    assert found.startswith("actor: stage 1: update needs ")
    assert "the GPU has 6.0 GiB (parameters " in found
    assert "run.preflight = off" in found


@pytest.mark.processes
def test_what_fits_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        assert problem(0, 80 * GIB) is None
    assert not caplog.records


def test_a_trace_that_fails_does_not_stop_the_run(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(memory_check.Tracer, "rank", broken)
    with caplog.at_level(logging.WARNING):
        assert problem(0, 1) is None
    assert caplog.messages == ["the memory of the actor was not checked: RuntimeError: no such operator"]


def test_one_rank_of_a_stage_traces_for_all(monkeypatch):
    monkeypatch.setattr(memory_check, "Tracer", None)  # calling it would fail
    assert problem(1, 1) is None
    assert problem(3, 1) is None


def test_nothing_is_traced_without_a_gpu(monkeypatch):
    monkeypatch.setattr(memory_check, "memory_problem", None)
    memory_check.check_memory(CONFIG, MODEL, Launch())
