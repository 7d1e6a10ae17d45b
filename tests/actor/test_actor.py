"""The actor on one rank: the lr = 0 gate, skipped steps, the reference policy, offloading."""

import gc
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import random

from fipo_megatron.actor import noise_floor, parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import LocalMicroBatch, local_micro_batches
from fipo_megatron.actor.update_metrics import NoiseError, NoiseFloor
from fipo_megatron.config import ActorConfig, AlgorithmConfig, Config, ModelConfig, OptimizerConfig, RolloutConfig
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
    """Builds an actor with changes to its configuration; destroys the process groups at the end."""

    def make(algorithm=layout_cases.ALGORITHM, temperature=1.0, **changes):
        actor = ActorConfig(**({"dtype": "float32", "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0)} | changes))
        layout = parallel.initialize(actor.parallel, seed=1)
        architecture = Architecture.from_hf(model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
        state = model.state_dict()

        def load(chunks):
            for chunk in chunks:
                hf_reference.load(chunk, state, architecture, layout)

        config = Config(actor=actor, algorithm=algorithm, rollout=RolloutConfig(temperature=temperature))
        return MegatronActor(config, architecture, layout, load)

    yield make
    parallel.destroy()


@pytest.fixture
def plan(trajectories):
    return plan_micro_batches([len(t) for t in trajectories], [range(4), range(4, 8)], token_budget=112)


def weights(actor):
    return [p.detach().clone() for p in actor.parameters()]


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


@pytest.mark.parametrize("algorithm", [{}, {"kind": "dapo", "entropy_coef": 0.1}, {"kl_coef": 0.1}], ids=repr)
def test_the_first_update_gives_the_log_probs_of_the_old_policy(build, plan, trajectories, algorithm):
    """Without a pass for them, all metrics, per-token values and weights keep their bits."""
    found = []
    for own_pass in (False, True):
        actor = build(algorithm=AlgorithmConfig(**algorithm))
        actor.keep_reference()
        reference = actor.reference_log_probs(plan, trajectories) if actor.config.algorithm.kl_coef else None
        old = actor.log_probs(plan, trajectories)
        updates = actor.update(plan, trajectories, [None, *old[1:]] if own_pass else old, reference, watch=range(8))
        found.append((updates, weights(actor)))
        parallel.destroy()
    (expected, expected_weights), (updates, new_weights) = found
    assert equal(expected_weights, new_weights)
    for one, other in zip(expected, updates, strict=True):
        assert (one.loss, one.grad_norm, one.statistics) == (other.loss, other.grad_norm, other.statistics)
        for index, part in one.tokens.items():
            assert part.values.keys() == other.tokens[index].values.keys()
            assert all(np.array_equal(part.values[name], other.tokens[index].values[name]) for name in part.values)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_noise_floor_is_zero_and_a_perturbed_weight_trips_the_gate(build, plan, trajectories, distributed_optimizer):
    actor = build(distributed_optimizer=distributed_optimizer)
    before = weights(actor)
    floor = actor.check_noise_floor(plan[0], trajectories)
    assert (floor.shift, floor.future_kl) == (0.0, 0.0)
    assert equal(before, weights(actor))
    old = actor.log_probs(plan[:1], trajectories)
    with torch.no_grad():
        actor.parameters()[7].view(-1)[3] += 0.05
    assert actor.noise_floor(plan[0], trajectories, old).shift > 0


def test_the_gate_is_a_real_training_pass_and_leaves_nothing(build, plan, trajectories):
    actor, seen = build(), []
    hook = actor.parameters()[3].register_hook(lambda gradient: seen.append(float(gradient.norm())))
    actor.noise_floor(plan[0], trajectories, actor.log_probs(plan[:1], trajectories))
    hook.remove()
    assert len(seen) == len(plan[0].micro_batches[0])
    assert max(seen) > 0
    assert all(not gradient.any() for gradient in actor.gradients())


@pytest.mark.parametrize("kind", ["fipo", "dapo"])
def test_the_gate_needs_no_reference_and_no_importance_weights(build, plan, trajectories, kind):
    actor = build(algorithm=AlgorithmConfig(kind=kind, kl_coef=0.04, entropy_coef=0.1, importance_cap=2.0))
    floor = actor.check_noise_floor(plan[0], trajectories)
    assert (floor.shift, floor.future_kl) == (0.0, 0.0)


def test_gate_bounds_the_future_kl_too(build, plan, trajectories, monkeypatch):
    actor = build(max_noise_shift=1e9, max_noise_future_kl=1e-6)
    original = actor.log_probs

    def perturbed(*arguments):
        stored = original(*arguments)
        with torch.no_grad():
            actor.parameters()[7].view(-1)[3] += 1.0
        return stored

    monkeypatch.setattr(actor, "log_probs", perturbed)
    with pytest.raises(NoiseError, match=r"actor.max_noise_future_kl = 1e-06"):
        actor.check_noise_floor(plan[0], trajectories)


def test_gate_has_nothing_to_compare_in_a_mini_batch_without_loss(build, trajectories):
    actor = build(algorithm=replace(layout_cases.ALGORITHM, mask_truncated=True))
    cut = [replace(t, finish_reason="length") for t in trajectories]
    assert actor.check_noise_floor(actor.plan([len(t) for t in cut], [range(8)])[0], cut) is None


def test_gate_refuses_to_start(build, plan, trajectories, monkeypatch):
    actor = build()
    original = actor.log_probs

    def perturbed(*arguments):
        stored = original(*arguments)
        with torch.no_grad():
            actor.parameters()[7].view(-1)[3] += 1.0
        return stored

    monkeypatch.setattr(actor, "log_probs", perturbed)
    with pytest.raises(
        NoiseError, match=r"actor.max_noise_shift = 0.01: the log-prob pass and the training pass differ"
    ):
        actor.check_noise_floor(plan[0], trajectories)


@pytest.mark.parametrize(
    ("tensor_size", "device", "names_it"), [(2, "cuda", True), (1, "cuda", False), (2, "cpu", False)]
)
def test_a_gate_that_trips_under_tensor_parallelism_names_nvls(tensor_size, device, names_it, monkeypatch):
    """NVLink switches add in an order of their own; only NCCL has them."""
    monkeypatch.setattr(noise_floor, "measure", lambda *inputs: NoiseFloor(0.5, 0.0))
    actor = SimpleNamespace(
        config=Config(model=ModelConfig("model")),
        layout=SimpleNamespace(tensor_size=tensor_size, device=torch.device(device)),
        log_probs=lambda plan, trajectories: [{}],
    )
    with pytest.raises(NoiseError, match=r"actor.max_noise_shift = \S+: .* differ by 0.5 at equal weights") as raised:
        noise_floor.check(actor, None, {})
    hint = "NCCL's all-reduce in NVLink switches, which NCCL_NVLS_ENABLE=0 turns off"
    assert (hint in str(raised.value)) == names_it


def test_non_finite_loss_changes_nothing_and_is_counted(build, plan, trajectories):
    actor = build()
    old = actor.log_probs(plan, trajectories)
    poisoned = [list(part) for part in old]
    bad = poisoned[0][0].log_probs.clone()
    bad[:] = math.nan
    poisoned[0][0] = TokenLogProbs(bad, poisoned[0][0].entropy)
    before = weights(actor)
    (first,) = actor.update(plan[:1], trajectories, poisoned[:1])
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
    hook = actor.parameters()[3].register_hook(lambda gradient: gradient * math.inf)
    (metrics,) = actor.update(plan[:1], trajectories, actor.log_probs(plan[:1], trajectories))
    assert metrics.skipped == "non-finite gradient"
    assert math.isfinite(metrics.loss)
    assert equal(before, weights(actor))
    hook.remove()
    (metrics,) = actor.update(plan[:1], trajectories, actor.log_probs(plan[:1], trajectories))
    assert not metrics.skipped


def test_a_gradient_whose_norm_overflows_is_no_step(build, plan, trajectories):
    actor = build()
    before = weights(actor)
    hook = actor.parameters()[3].register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    (metrics,) = actor.update(plan[:1], trajectories, actor.log_probs(plan[:1], trajectories))
    hook.remove()
    assert metrics.skipped == "non-finite gradient"
    assert equal(before, weights(actor))


def test_warm_up_counts_the_steps_taken(build, plan, trajectories, caplog):
    """Rates are lr/4, lr/2, ...; a skipped step uses none and is logged."""
    actor = build(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=4))
    hook = actor.parameters()[3].register_hook(lambda gradient: gradient * math.nan)
    skipped = actor.update(plan[:1], trajectories, actor.log_probs(plan[:1], trajectories))
    hook.remove()
    taken = actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
    assert math.isnan(skipped[0].learning_rate)
    assert [m.learning_rate for m in taken] == pytest.approx([2.5e-4, 5e-4])
    assert "skipped on all ranks: non-finite gradient (1 so far)" in caplog.text
    assert all(not gradient.any() for gradient in actor.gradients())


def test_temperature_is_that_of_the_sampling(build, plan, trajectories, model):
    actor = build(temperature=0.7)
    found = [x for part in actor.log_probs(plan[:1], trajectories) for x in part]
    for members, each in zip(plan[0].micro_batches[0], found, strict=True):
        start = 0
        for i in members:
            t = trajectories[i]
            tokens = torch.from_numpy(np.concatenate([t.prompt.tokens, t.tokens])).long()
            with torch.no_grad():
                logits = model(tokens[None], use_cache=False).logits[0, :-1].float() / 0.7
            want = logits.log_softmax(-1)
            got = each.log_probs[start : start + len(tokens) - 1]
            assert (got - want.gather(1, tokens[1:, None])[:, 0]).abs().max() <= 1e-5
            entropy = -(want.exp() * want).sum(-1)
            assert (each.entropy[start : start + len(tokens) - 1] - entropy).abs().max() <= 1e-5
            start += len(t)


def test_entropy_term_acts_on_the_current_policy(build, trajectories, plan):
    """Zero advantages leave the entropy term as the whole gradient, which increases the entropy."""
    idle = [replace(t, advantage=0.0) for t in trajectories]
    actor = build(algorithm=AlgorithmConfig(kind="dapo", entropy_coef=1.0))
    metrics = actor.update(plan * 3, idle, actor.log_probs(plan, idle) * 3)
    assert metrics[0].grad_norm > 1e-3
    assert metrics[-2].statistics["entropy"] > metrics[0].statistics["entropy"]


def test_behaviour_log_probs_of_the_engine_reach_the_loss(build, plan, trajectories):
    actor = build(algorithm=AlgorithmConfig(kind="dapo", importance_cap=1.05))
    old = actor.log_probs(plan, trajectories)
    gaps = []
    for members, found in zip(plan[0].micro_batches[0], old[0], strict=True):
        start = 0
        for i in members:
            t = trajectories[i]
            first = start + len(t.prompt.tokens) - 1
            gap = found.log_probs[first : first + len(t.tokens)].numpy() - t.behaviour_log_probs
            gaps += list(gap[t.mask])
            start += len(t)
    statistics = actor.update(plan, trajectories, old)[0].statistics
    assert statistics["mismatch_abs_mean"] == pytest.approx(np.mean(np.abs(gaps)), rel=1e-4)
    assert statistics["importance_weight_mean"] == pytest.approx(np.mean(np.exp(gaps).clip(max=1.05)), rel=1e-4)


def test_plans_and_log_probs_that_do_not_belong_are_refused(build, plan, trajectories):
    actor = build()
    lengths = [len(t) for t in trajectories]
    assert actor.plan(lengths, [range(8)]) == plan_micro_batches(lengths, [range(8)], token_budget=32768)
    two_ranks = plan_micro_batches(lengths, [range(8)], token_budget=112, data_parallel_size=2)
    with pytest.raises(ValueError, match="plan: made for 2 data-parallel ranks, there are 1"):
        actor.log_probs(two_ranks, trajectories)
    old = actor.log_probs(plan, trajectories)
    for wrong in (old[:1], [old[0][:1], old[1]], [old[0], None], [None]):
        with pytest.raises(ValueError, match="old: not the log-probs of this plan"):
            actor.update(plan, trajectories, wrong)
    with pytest.raises(ValueError, match="old: not the log-probs of this plan"):
        actor.update([], trajectories, [None])
    with pytest.raises(ValueError, match="reference: not the log-probs of this plan"):
        actor.update(plan, trajectories, old, [None, old[1]])
    with actor.offloaded(), pytest.raises(RuntimeError, match="the actor is offloaded"):
        actor.log_probs(plan, trajectories)


def test_the_plan_balances_model_flops(build):
    """Attention makes the long sequence as expensive as all others; by tokens, two of them would join it."""
    (plan,) = build().plan([16_000] + [4_000] * 7, [range(8)])
    assert plan.micro_batches == (((0,), (1, 2, 3, 4, 5, 6, 7)),)


def test_micro_batches_go_to_the_device_one_at_a_time(build, trajectories):
    actor, live = build(), []
    count = lambda *_: live.append(sum(isinstance(one, LocalMicroBatch) for one in gc.get_objects()))  # noqa: E731
    actor.chunks[0].register_forward_pre_hook(count)
    (plan,) = plan_micro_batches([len(t) for t in trajectories], [range(8)], token_budget=112)
    old = actor.log_probs([plan], trajectories)
    actor.update([plan], trajectories, old)
    assert len(live) == 2 * len(plan.micro_batches[0]) >= 8
    assert max(live) == 1


def test_auxiliary_losses_need_the_token_mean(build):
    algorithm = AlgorithmConfig(kind="grpo", aggregation="sequence_mean")
    with pytest.raises(ValueError, match=r"moe_aux_loss_coeff = 0.01: needs algorithm.aggregation = token_mean"):
        build(algorithm=algorithm, transformer={"moe_aux_loss_coeff": 0.01})


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
    with pytest.raises(ValueError, match=r"reference: missing, needed for algorithm\.kl_coef = 0\.1"):
        actor.update(plan, trajectories, actor.log_probs(plan, trajectories))


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_offload_frees_memory_and_changes_nothing(build, plan, trajectories, distributed_optimizer):
    """Two actors take two rounds of updates, one is offloaded in between: the results are bitwise equal."""
    results = []
    for away in (False, True):
        actor = build(distributed_optimizer=distributed_optimizer)
        metrics = actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
        if away:
            size = sum(p.numel() * p.element_size() for p in actor.parameters())
            with actor.offloaded() as freed:
                assert freed >= 4 * size  # parameters, gradients, two moments
                assert all(p.untyped_storage().nbytes() == 0 for p in actor.parameters())
                assert all(g.untyped_storage().nbytes() == 0 for g in actor.gradients())
        metrics += actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
        results.append(([m.loss for m in metrics], weights(actor)))
        parallel.destroy()
    (losses, plain), (losses_away, offloaded) = results
    assert losses == losses_away
    assert equal(plain, offloaded)


def test_bfloat16_trains_float32_main_parameters(build, plan, trajectories):
    """Main parameters and loss change at lr 1e-6, where a bfloat16 weight would not."""
    actor = build(dtype="bfloat16", optimizer=OptimizerConfig(lr=1e-6, warmup_steps=0), max_noise_shift=0.0)
    actor.check_noise_floor(plan[0], trajectories)
    inner = actor.optimizer.chained_optimizers[0].optimizer
    main = [p for group in inner.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in main]
    actor.update(plan, trajectories, actor.log_probs(plan, trajectories))
    moved = np.mean([not torch.equal(a, b) for a, b in zip(before, main, strict=True)])
    assert {p.dtype for p in main} == {torch.float32}
    assert {p.dtype for p in actor.parameters()} == {torch.bfloat16}
    assert moved > 0.9


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_gradient(build, plan, trajectories, recompute):
    gradients = []
    for setting in ("none", recompute):
        actor = build(recompute=setting)
        old = actor.log_probs(plan, trajectories)
        actor.forward_backward(plan[0], trajectories, old[0])
        gradients.append([p.main_grad.clone() for p in actor.parameters()])
        parallel.destroy()
    assert equal(*gradients)


@pytest.mark.parametrize("on_host", [True, False])
def test_padding_has_no_boundaries_of_its_own(build, plan, trajectories, on_host):
    """Transformer Engine compares them with the others on the host, twice in every layer."""
    members = plan[0].micro_batches[0]
    for micro in local_micro_batches(
        members, trajectories, build().layout, token_multiple=16, boundaries_on_host=on_host
    ):
        packed = micro.packed_seq_params
        assert packed.cu_seqlens_q_padded is None
        assert packed.cu_seqlens_kv_padded is None
        assert packed.cu_seqlens_q.tolist() == list(packed.cu_seqlens_host)
        assert int(packed.cu_seqlens_q[-1]) == micro.tokens.shape[1]


@pytest.fixture
def regions(monkeypatch):
    """A list that grows by one entry with every recomputed region."""
    found, forward = [], random.CheckpointFunction.forward
    monkeypatch.setattr(
        random.CheckpointFunction, "forward", staticmethod(lambda *given: found.append(1) or forward(*given))
    )
    return found


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_only_the_training_pass_recomputes(build, plan, trajectories, recompute, regions):
    """A recomputed region of a forward-only pass would leave its FP8 scales to the next training pass."""
    actor = build(recompute=recompute)
    old = actor.log_probs(plan, trajectories)
    assert len(regions) == 0
    actor.forward_backward(plan[0], trajectories, old[0])
    assert len(regions) == actor.chunks[0].config.num_layers * len(plan[0].micro_batches[0])


def test_the_pass_that_measures_the_loads_of_experts_recomputes_nothing(plan, trajectories, regions):
    config = layout_cases.build_transformers_model("qwen3-moe").config.to_dict()
    settings = {"dtype": "float32", "recompute": "full", "transformer": {"moe_aux_loss_coeff": 0.01}}
    actor_config = Config(actor=ActorConfig(**settings), algorithm=layout_cases.ALGORITHM)
    layout = parallel.initialize(actor_config.actor.parallel, seed=1)
    architecture = Architecture.from_hf(config | {"architectures": ["Qwen3MoeForCausalLM"]})
    actor = MegatronActor(actor_config, architecture, layout, lambda chunks: None)
    actor.forward_backward(plan[0], trajectories, actor.log_probs(plan, trajectories)[0])
    parallel.destroy()
    assert len(regions) == actor.chunks[0].config.num_layers * len(plan[0].micro_batches[0])
