"""The loss with missing, non-finite and low-precision input, and the values it reports."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fipo_megatron.algorithm.future_kl import SequenceShards, future_kl
from fipo_megatron.algorithm.policy_loss import LossInputs, policy_loss, truncated_importance_weights
from fipo_megatron.algorithm.policy_loss_config import KIND_DEFAULTS, PolicyLossConfig, loss_config
from tests.algorithm import reference


def make_inputs(lengths=(50, 30), seed=0, dtype=torch.float64, **changes):
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    old = -rng.gamma(1.0, 1.0, total)
    values = {
        "log_probs": torch.tensor(old + rng.normal(0, 0.2, total), dtype=dtype, requires_grad=True),
        "old_log_probs": torch.tensor(old, dtype=dtype),
        "advantages": torch.tensor(rng.normal(0, 1, len(lengths)).repeat(lengths), dtype=dtype),
        "mask": torch.tensor(rng.random(total) < 0.9),
        "shards": SequenceShards.build(lengths),
    }
    return LossInputs(**(values | changes))


def test_first_update_is_dapo():
    """The first update has d = 0, so every weight is exactly 1 and the loss is DAPO's, bit for bit."""
    inputs = make_inputs(dtype=torch.float32)
    inputs = replace(inputs, log_probs=inputs.old_log_probs.clone().requires_grad_())
    fipo, dapo = (policy_loss(inputs, loss_config(kind)) for kind in ("fipo", "dapo"))
    assert torch.equal(fipo.weight, torch.ones_like(fipo.weight))
    assert torch.equal(fipo.future_kl, torch.zeros_like(fipo.future_kl))
    assert torch.equal(fipo.numerator, dapo.numerator)


def test_nothing_flows_through_the_weight_and_nothing_is_kept_for_it():
    inputs = make_inputs(lengths=(4096,))
    saved = {}
    for kind in ("fipo", "dapo"):
        saved[kind] = 0
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kind=kind: saved.__setitem__(kind, saved[kind] + x.numel()) or x, lambda x: x
        ):
            output = policy_loss(inputs, loss_config(kind))
        assert not output.weight.requires_grad
        assert not output.future_kl.requires_grad
    assert saved["fipo"] == saved["dapo"]


def test_reports_the_future_kl_and_weight_of_each_token():
    inputs, config = make_inputs(), loss_config("fipo", weight_clip=(0.9, 1.1))
    shift = torch.where(inputs.mask, inputs.log_probs - inputs.old_log_probs, 0.0).detach()
    output = policy_loss(inputs, config)
    assert torch.allclose(output.future_kl, future_kl(shift, config.half_life, inputs.shards), rtol=0, atol=1e-15)
    assert torch.equal(output.weight, output.future_kl.exp().clamp(0.9, 1.1))


def test_entropy_term_and_its_gradient():
    inputs = make_inputs()
    entropy = torch.rand(80, dtype=torch.float64, requires_grad=True)
    plain = policy_loss(inputs, loss_config("dapo"))
    rewarded = policy_loss(replace(inputs, entropy=entropy), loss_config("dapo", entropy_coef=0.3))
    assert rewarded.numerator.item() == pytest.approx(plain.numerator.item() - 0.3 * entropy[inputs.mask].sum().item())
    rewarded.numerator.backward()
    assert torch.equal(entropy.grad, -0.3 * inputs.mask.double())
    assert rewarded.statistics.metrics()["entropy"] == pytest.approx(entropy[inputs.mask].mean().item())


def test_truncated_importance_weights():
    old, behaviour = torch.tensor([-1.0, -1.0, -1.0, -5.0]), torch.tensor([-1.0, -3.0, -0.5, 0.0])
    weights = truncated_importance_weights(old, behaviour, torch.tensor([True, True, True, False]), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5), 1.0])


def test_engine_mismatch_is_reported_apart_from_the_drift():
    inputs = make_inputs(dtype=torch.float32)
    gap = 0.1 * torch.randn(80)
    with_engine = replace(inputs, behaviour_log_probs=inputs.old_log_probs - gap)
    metrics = policy_loss(with_engine, loss_config("fipo", importance_cap=1.05)).statistics.metrics()
    kept = gap[inputs.mask].double()
    assert metrics["mismatch_abs_mean"] == pytest.approx(kept.abs().mean().item(), rel=1e-4)
    assert metrics["mismatch_abs_max"] == pytest.approx(kept.abs().max().item(), rel=1e-4)
    assert metrics["mismatch_kl"] == pytest.approx((kept.exp() - 1 - kept).mean().item(), rel=1e-3)
    assert metrics["importance_weight_mean"] == pytest.approx(kept.exp().clamp(max=1.05).mean().item(), rel=1e-5)
    assert metrics["importance_truncated_fraction"] == pytest.approx((kept.exp() > 1.05).double().mean().item())
    assert "mismatch_kl" not in policy_loss(inputs, loss_config("fipo")).statistics.metrics()


@pytest.mark.parametrize("field", ["log_probs", "old_log_probs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KIND_DEFAULTS)
def test_a_non_finite_token_reaches_the_numerator(field, bad, kind):
    """The clamp of d, the filter and the weight clip must not turn it into a plausible number."""
    inputs = make_inputs()
    values = getattr(inputs, field).detach().clone()
    values[int(inputs.mask.nonzero()[7])] = bad
    output = policy_loss(replace(inputs, **{field: values}), loss_config(kind, kl_coef=0.0))
    assert output.numerator.isnan()
    assert math.isnan(output.statistics.metrics()["policy_kl"])


@pytest.mark.parametrize("kind", ["fipo", "dapo"])
@pytest.mark.parametrize("bad_first", [True, False])
def test_a_non_finite_token_is_seen_even_in_a_dropped_response(kind, bad_first):
    inputs = make_inputs(lengths=(40, 40))
    start = 0 if bad_first else 40
    values = inputs.old_log_probs.clone()
    values[start + 5 : start + 8] += 4.0  # above the dual clip: the response is dropped
    values[start + 20] = -math.inf
    advantages = torch.where(torch.arange(80) // 40 == start // 40, -1.0, 1.0).double()
    mask = torch.ones(80, dtype=torch.bool)
    poisoned = replace(inputs, log_probs=values, advantages=advantages, mask=mask)
    output = policy_loss(poisoned, loss_config(kind))
    assert output.statistics.metrics()["dropped_sequences"] == 1
    assert output.numerator.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_behaviour_log_prob_is_seen(bad):
    inputs = make_inputs()
    behaviour = inputs.old_log_probs.clone()
    behaviour[int(inputs.mask.nonzero()[7])] = bad
    output = policy_loss(replace(inputs, behaviour_log_probs=behaviour), loss_config("fipo", importance_cap=2.0))
    assert output.numerator.isnan()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_shifts_without_a_clamp_keep_the_gradient_finite(advantage, sign):
    inputs = make_inputs(dtype=torch.float32)
    leaf = (inputs.old_log_probs + 100.0 * sign).requires_grad_()
    moved = replace(inputs, log_probs=leaf, advantages=torch.full((80,), advantage), reference_log_probs=leaf.detach())
    output = policy_loss(moved, loss_config("fipo", shift_clamp=math.inf, sequence_drop=False, kl_coef=0.1))
    output.numerator.backward()
    assert output.numerator.isfinite()
    assert leaf.grad.isfinite().all()


def test_the_kl_term_pulls_at_any_distance():
    """``shift_clamp`` bounds d, not the distance to the reference, where a large penalty matters most."""
    inputs = make_inputs()
    reference_log_probs = inputs.old_log_probs - 30.0
    moved = replace(inputs, reference_log_probs=reference_log_probs)
    policy_loss(moved, loss_config("fipo", kl_coef=0.1, kl_estimator="k2")).numerator.backward()
    plain = make_inputs()
    policy_loss(plain, loss_config("fipo")).numerator.backward()
    pull = (inputs.log_probs.grad - plain.log_probs.grad)[inputs.mask]
    gap = (inputs.log_probs - reference_log_probs).detach()[inputs.mask]
    assert torch.allclose(pull, 0.1 * gap)


def test_tokens_outside_the_mask_have_no_influence():
    inputs = make_inputs()
    values = inputs.log_probs.detach().clone()
    values[~inputs.mask] = math.nan
    poisoned = replace(inputs, log_probs=values.requires_grad_())
    want, got = policy_loss(inputs, PolicyLossConfig()), policy_loss(poisoned, PolicyLossConfig())
    assert torch.equal(want.numerator, got.numerator)
    got.numerator.backward()
    assert torch.equal(poisoned.log_probs.grad[~inputs.mask], torch.zeros(int((~inputs.mask).sum())).double())
    assert poisoned.log_probs.grad.isfinite().all()


def test_low_precision_log_probs_are_computed_in_float32():
    inputs = make_inputs(dtype=torch.bfloat16)
    output = policy_loss(inputs, PolicyLossConfig())
    assert output.numerator.dtype == torch.float32
    exact = policy_loss(inputs.to(torch.float64), PolicyLossConfig())
    assert output.numerator.item() == pytest.approx(exact.numerator.item(), rel=1e-5)


def test_a_filler_adds_nothing():
    """A filler is fully masked: it adds no token, gradient or statistic, and nothing non-finite."""
    inputs = make_inputs()
    output = policy_loss(replace(inputs, mask=torch.zeros(80, dtype=torch.bool)), PolicyLossConfig())
    output.numerator.backward()
    assert (output.numerator.item(), output.denominator.item()) == (0.0, 0)
    assert torch.equal(inputs.log_probs.grad, torch.zeros(80).double())
    assert output.statistics.metrics() == {"tokens": 0.0, "sequences": 0.0, "dropped_sequences": 0.0}
    whole = policy_loss(inputs, PolicyLossConfig()).statistics
    assert (whole + output.statistics).metrics() == whole.metrics()


def test_denominators_are_integers():
    for kind in KIND_DEFAULTS:
        output = policy_loss(make_inputs(), loss_config(kind, kl_coef=0.0))
        assert output.denominator.dtype == torch.int64


def test_extreme_future_kl_keeps_the_weight_finite():
    inputs = make_inputs(lengths=(2000,))
    shifted = replace(inputs, log_probs=inputs.old_log_probs + 2.0)
    output = policy_loss(shifted, loss_config("fipo", half_life=math.inf))
    assert output.numerator.isfinite()
    assert output.statistics.metrics()["raw_weight_max"] == pytest.approx(math.exp(80))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"old_log_probs": torch.zeros(79)}, {}, r"old_log_probs: expected shape \[80\].*got \[79\]"),
        ({"mask": torch.ones(80)}, {}, "mask: expected bool, got torch.float32"),
        ({"advantages": torch.ones(80, dtype=torch.int64)}, {}, "advantages: expected a floating point dtype"),
        ({"advantages": torch.ones(80, dtype=torch.bool)}, {}, "advantages: expected a floating point dtype"),
        ({}, {"kl_coef": 0.1}, "reference_log_probs: missing, needed for kl_coef = 0.1"),
        ({}, {"importance_cap": 2.0}, "behaviour_log_probs: missing, needed for importance_cap = 2.0"),
        ({}, {"entropy_coef": 0.1}, "entropy: missing, needed for entropy_coef = 0.1"),
        ({"shards": SequenceShards.build([20, 20], owners=((0, 0), (1, 0), (1, 1), (0, 1)))}, {}, "pass gather_over"),
    ],
)
def test_wrong_inputs_are_named(changes, config, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(make_inputs(**changes), loss_config("fipo", **config))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "gipo"),
        ("safety_rule", "none"),
        ("aggregation", "mean"),
        ("kl_estimator", "k4"),
        ("kl_coef", math.inf),
        ("weight_max", math.inf),
        ("weight_clip", (0.0, math.inf)),
        ("half_life", 0.0),
        ("half_life", math.nan),
        ("weight_clip", (1.2, 1.0)),
        ("weight_clip", (-0.1, 1.0)),
        ("weight_max", 0.0),
        ("safety_threshold", 0.0),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 1.2),
        ("sequence_drop_threshold", -1),
        ("shift_clamp", 0.0),
        ("kl_coef", -1.0),
        ("entropy_coef", math.inf),
        ("importance_cap", 0.0),
    ],
)
def test_every_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: must be .*, got "):
        PolicyLossConfig(**{field: value})


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"half_life: must be .*\nclip_low: must be"):
        PolicyLossConfig(half_life=0.0, clip_low=2.0)


def test_reference_of_one_token_by_hand():
    """Checks the loop by hand: r = e^0.5 > 1.28, so A > 0 is clipped; f = min(e^0.5, 1.2)."""
    response = reference.Response(np.array([-0.5]), np.array([-1.0]), np.array([2.0]), np.array([True]))
    loss, gradients, denominator, _ = reference.mini_batch([response], PolicyLossConfig())
    assert (loss, gradients[0].tolist(), denominator) == (pytest.approx(-1.28 * 1.2 * 2.0), [0.0], 1)
    response.advantage = np.array([-2.0])
    loss, gradients, _, _ = reference.mini_batch([response], PolicyLossConfig())
    assert loss == pytest.approx(math.exp(0.5) * 1.2 * 2.0)
    assert gradients[0].tolist() == pytest.approx([math.exp(0.5) * 1.2 * 2.0])
