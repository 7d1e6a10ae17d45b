"""The actor on one rank: the lr = 0 gate, steps that must not be taken, the reference policy, offloading."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.config import ActorConfig, AlgorithmConfig, Config, OptimizerConfig
from fipo_megatron.data.packing import plan_micro_batches
from fipo_megatron.weights.architecture import Architecture
from tests.actor import hf_reference
from tests.distributed import layout_cases


@pytest.fixture(scope="module")
def model():
    return layout_cases.build_transformers_model("qwen3")


@pytest.fixture(scope="module")
def trajectories(model):
    return layout_cases.make_expected(model).trajectories


@pytest.fixture
def build(model):
    """Builds an actor with changes to its configuration; takes everything down at the end."""

    def make(algorithm=layout_cases.ALGORITHM, **changes):
        actor = ActorConfig(**({"dtype": "float32", "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0)} | changes))
        layout = parallel.initialize(actor.parallel, seed=1)
        architecture = Architecture.from_hf(model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
        state = model.state_dict()

        def load(chunks):
            for chunk in chunks:
                hf_reference.load(chunk, state, architecture, layout)

        return MegatronActor(Config(actor=actor, algorithm=algorithm), architecture, layout, load)

    yield make
    parallel.destroy()


@pytest.fixture
def plan(trajectories):
    return plan_micro_batches([len(t) for t in trajectories], [range(4), range(4, 8)], token_budget=112)


def weights(actor):
    return [p.detach().clone() for p in actor._parameters()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_first_update_sees_no_drift_and_the_second_does(build, plan, trajectories):
    actor = build()
    first, second = actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
    assert (first.statistics["shift_abs_max"], first.statistics["raw_weight_max"]) == (0.0, 1.0)
    assert second.statistics["shift_abs_max"] > 1e-3
    assert first.statistics["entropy"] > 1
    assert not first.skipped
    assert not second.skipped


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_noise_floor_is_zero_and_a_perturbed_weight_trips_the_gate(build, plan, trajectories, distributed_optimizer):
    actor = build(distributed_optimizer=distributed_optimizer)
    before = weights(actor)
    floor = actor.check_noise_floor(plan[0], trajectories)
    assert (floor.shift, floor.future_kl) == (0.0, 0.0)
    assert equal(before, weights(actor))
    old = actor.log_probs(plan[:1], trajectories)
    with torch.no_grad():
        actor._parameters()[7].view(-1)[3] += 0.05
    assert actor.noise_floor(plan[0], trajectories, old).shift > 0


def test_gate_refuses_to_start(build, plan, trajectories, monkeypatch):
    actor = build()
    original = actor.log_probs

    def perturbed(*arguments):
        stored = original(*arguments)
        with torch.no_grad():
            actor._parameters()[7].view(-1)[3] += 1.0
        return stored

    monkeypatch.setattr(actor, "log_probs", perturbed)
    with pytest.raises(
        ValueError, match=r"actor.max_noise_shift = 0.01: the log-prob pass and the training pass differ"
    ):
        actor.check_noise_floor(plan[0], trajectories)


def test_non_finite_loss_changes_nothing_and_is_counted(build, plan, trajectories):
    actor = build()
    old = actor.log_probs(plan, trajectories)
    poisoned = [list(part) for part in old]
    bad = poisoned[0][0].log_probs.clone()
    bad[:] = math.nan
    poisoned[0][0] = TokenLogProbs(bad, poisoned[0][0].entropy)
    before = weights(actor)
    (first,) = actor.update(plan[:1], trajectories, poisoned)
    assert first.skipped == "non-finite loss"
    assert math.isnan(first.grad_norm)
    assert equal(before, weights(actor))
    assert actor.skipped_steps == 1
    (after,) = actor.update(plan[1:], trajectories, old[1:])
    assert not after.skipped
    assert not equal(before, weights(actor))


def test_non_finite_gradient_changes_nothing(build, plan, trajectories):
    actor = build()
    before = weights(actor)
    hook = actor._parameters()[3].register_hook(lambda gradient: gradient * math.inf)
    (metrics,) = actor.update(plan[:1], trajectories, actor.log_probs(plan, trajectories))
    assert metrics.skipped == "non-finite gradient"
    assert math.isfinite(metrics.loss)
    assert equal(before, weights(actor))
    hook.remove()
    (metrics,) = actor.update(plan[:1], trajectories, actor.log_probs(plan, trajectories))
    assert not metrics.skipped


def test_empty_loss_changes_nothing(build, trajectories):
    actor = build(algorithm=replace(layout_cases.ALGORITHM, mask_truncated=True))
    cut = [replace(t, finish_reason="length") for t in trajectories]
    plan = plan_micro_batches([len(t) for t in cut], [range(8)], token_budget=112)
    before = weights(actor)
    (metrics,) = actor.update(plan, cut, actor.log_probs(plan, cut))
    assert (metrics.skipped, metrics.denominator) == ("empty loss", 0)
    assert math.isnan(metrics.loss)
    assert equal(before, weights(actor))


def test_reference_policy_stays_where_it_was_kept(build, plan, trajectories):
    actor = build(algorithm=AlgorithmConfig(kl_coef=0.1, kl_estimator="k2"))
    actor.keep_reference()
    at_start = actor.log_probs(plan, trajectories)
    actor.update(plan, trajectories, at_start, actor.reference_log_probs(plan, trajectories))
    moved = weights(actor)
    kept = actor.reference_log_probs(plan, trajectories)
    assert equal(moved, weights(actor))
    for was, now in zip(at_start, kept, strict=True):
        assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(was, now, strict=True))
    metrics = actor.update(plan, trajectories, actor.log_probs(plan, trajectories), kept)
    assert metrics[0].statistics["reference_kl"] > 0


def test_reference_is_needed_before_it_is_used(build, plan, trajectories):
    actor = build(algorithm=AlgorithmConfig(kl_coef=0.1))
    with pytest.raises(RuntimeError, match="keep_reference"):
        actor.reference_log_probs(plan, trajectories)
    with pytest.raises(ValueError, match="reference_log_probs: missing"):
        actor.update(plan, trajectories, actor.log_probs(plan, trajectories))


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_offload_frees_memory_and_changes_nothing(build, plan, trajectories, distributed_optimizer):
    """Two actors take two rounds of updates, one of them away in between: bit for bit the same."""
    results = []
    for away in (False, True):
        actor = build(distributed_optimizer=distributed_optimizer)
        metrics = actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
        if away:
            size = sum(p.numel() * p.element_size() for p in actor._parameters())
            with actor.offloaded() as freed:
                assert freed >= 4 * size  # parameters, gradients, two moments
                assert all(p.untyped_storage().nbytes() == 0 for p in actor._parameters())
                assert all(b.grad_data.untyped_storage().nbytes() == 0 for b in actor._gradient_buffers())
        metrics += actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
        results.append(([m.loss for m in metrics], weights(actor)))
        parallel.destroy()
    (losses, plain), (losses_away, offloaded) = results
    assert losses == losses_away
    assert equal(plain, offloaded)


def test_bfloat16_trains_float32_main_parameters(build, plan, trajectories):
    """At lr 1e-6 a bfloat16 weight would never move; the main parameters do, and so does the loss."""
    actor = build(dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-6, warmup_steps=0), max_noise_shift=0.0)
    actor.check_noise_floor(plan[0], trajectories)
    inner = actor.optimizer.chained_optimizers[0].optimizer
    main = [p for group in inner.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in main]
    actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
    moved = np.mean([not torch.equal(a, b) for a, b in zip(before, main, strict=True)])
    assert {p.dtype for p in main} == {torch.float32}
    assert {p.dtype for p in actor._parameters()} == {torch.bfloat16}
    assert moved > 0.9


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_gradient(build, plan, trajectories, recompute):
    gradients = []
    for setting in ("none", recompute):
        actor = build(recompute=setting)
        old = actor.log_probs(plan, trajectories)
        actor._forward_backward(plan[0], trajectories, old[0], None)
        gradients.append([p.main_grad.clone() for p in actor._parameters()])
        parallel.destroy()
    assert equal(*gradients)
