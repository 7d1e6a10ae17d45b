"""Layouts that are proposed: they divide the model, and their short computation agrees with the full plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fipo_megatron.config import ActorConfig, Config, DataConfig, RewardConfig, RolloutConfig, layout_conflicts
from fipo_megatron.observe.devices import device
from fipo_megatron.plan import layout_search
from fipo_megatron.plan.gpu_memory import GIB
from fipo_megatron.plan.plan import Request, make_plan
from fipo_megatron.plan.step_estimate import ClusterShape
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.weights.architecture import Architecture


def request(model, gpus=32, **sglang):
    config = Config(
        actor=ActorConfig(token_budget=8192),
        data=DataConfig(max_prompt_tokens=1024),
        rollout=RolloutConfig(max_response_tokens=3072, sglang=sglang),
        reward=RewardConfig(overlong_buffer_tokens=0),
    )
    architecture = Architecture.from_hf(json.loads(Path(f"tests/weights/configs/{model}.json").read_text()))
    return Request(
        config, architecture, ClusterShape(gpus, gpus), device("h100"), int(79.1 * GIB), "transformer_engine"
    )


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Qwen3-30B-A3B"])
def test_every_variant_can_be_set_up(model):
    asked = request(model)
    variants = list(layout_search._variants(asked))
    assert len({str(actor) for actor in variants}) == len(variants) > 50
    for actor in variants:
        assert not layout_conflicts(actor.parallel, 32)
        assert not asked.architecture.problems(actor)
    assert {actor.token_budget for actor in variants} >= {8192, 4096}
    assert any(actor.parallel.expert_parallel > 1 for actor in variants) == ("A3B" in model)


def test_changes_are_overrides():
    asked = request("Qwen2.5-7B")
    for actor in layout_search._variants(asked):
        for change in layout_search._changes(asked.config.actor, actor):
            name, _, value = change.partition("=")
            owner = actor.parallel if name.startswith("actor.parallel.") else actor
            assert str(getattr(owner, name.rpartition(".")[2])).lower() == value


def test_servers_that_are_too_small_are_made_larger():
    asked = replace(request("Qwen2.5-32B"), gpu_bytes=72 * GIB)
    changed, overrides = layout_search.with_fitting_servers(asked)
    (override,) = overrides
    assert override == f"rollout.sglang.tp_size={changed.config.rollout.sglang['tp_size']}"
    assert changed.config.rollout.sglang["tp_size"] > 1
    assert layout_search.with_fitting_servers(changed) == (changed, ())


@pytest.mark.processes
def test_the_short_computation_agrees_with_the_full_plan():
    asked = request("Qwen2.5-0.5B", gpus=8)
    with Tracer(workers=2) as tracer:
        found = layout_search.fitting_layouts(asked, tracer)
        assert found == sorted(found, key=lambda candidate: (candidate.seconds, candidate.training_seconds))
        by_pipeline = {candidate.request.config.actor.parallel.pipeline_parallel: candidate for candidate in found}
        for candidate in by_pipeline.values():
            plan = make_plan(candidate.request, tracer)
            assert candidate.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.12), candidate.changes
            assert candidate.peak_bytes >= 0.97 * plan.peak_bytes
            assert candidate.seconds == pytest.approx(plan.time.step_seconds)
            training = plan.time.phase("log_probs") + plan.time.phase("update")
            assert candidate.training_seconds == pytest.approx(training)
