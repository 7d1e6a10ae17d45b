"""The loss on CUDA is the loss on the CPU: value, gradient and statistics, without a wait for the device."""

import numpy as np
import pytest
import torch

from fipo_megatron.algorithm.future_kl import SequenceShards, discount, future_kl, suffix_scan
from fipo_megatron.algorithm.policy_loss import LossInputs, policy_loss
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig, loss_config
from tests.algorithm.test_golden import CASES, GOLDEN, golden_config
from tests.gpu.cuda_checks import no_sync

LENGTHS = (700, 1, 33, 1500, 64)
CONFIGS = {
    "fipo": PolicyLossConfig(dual_clip=2.0),
    "fipo, long and unclipped": PolicyLossConfig(half_life=1082.0, weight_clip=None, safety_threshold=1.5),
    "fipo, sequence mean, all terms": PolicyLossConfig(
        aggregation="sequence_mean", kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01, importance_cap=2.0
    ),
    "dapo": loss_config("dapo"),
    "grpo": loss_config("grpo"),
}


def random_inputs(device, seed=0):
    """Two responses in five with a few tokens above any ratio bound; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def normal(mean, spread):
        return mean + spread * torch.randn(total, generator=generator)

    old = -normal(1.0, 1.0).abs()
    far = (torch.rand(total, generator=generator) < 0.004).float() * (torch.arange(total) >= 734)
    tensors = {
        "log_probs": old + normal(0.0, 0.1) + 2.5 * far,
        "old_log_probs": old,
        "advantages": torch.tensor([0.7, -1.1, 0.4, -0.8, 1.9]).repeat_interleave(torch.tensor(LENGTHS)),
        "mask": torch.rand(total, generator=generator) < 0.9,
        "reference_log_probs": old + normal(0.0, 0.2),
        "behaviour_log_probs": old + normal(0.0, 0.3),
        "entropy": normal(1.0, 0.5).abs(),
    }
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    on_device["log_probs"].requires_grad_()
    return LossInputs(shards=SequenceShards.build(LENGTHS, device=device), **on_device)


def run(inputs, config):
    inputs.log_probs.grad = None
    output = policy_loss(inputs, config)
    output.numerator.backward()
    return output, inputs.log_probs.grad


def relative_difference(got, want):
    return float((got.cpu().double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case, device):
    with np.load(GOLDEN / "fipo_loss.npz") as arrays:
        old, new, adv, mask, expected_grad = (
            torch.from_numpy(arrays[f"{case}/{name}"]).to(device) for name in ("old", "new", "adv", "mask", "grad_new")
        )
    new = new.flatten().requires_grad_()
    shards = SequenceShards.build([mask.shape[1]] * mask.shape[0], device=device)
    inputs = LossInputs(new, old.flatten(), adv.flatten(), mask.flatten() == 1, shards)
    output = policy_loss(inputs, golden_config(case))
    (output.numerator / output.denominator).backward()
    assert torch.linalg.norm(new.grad - expected_grad.flatten()) <= 1e-5 * torch.linalg.norm(expected_grad)
    metrics = output.statistics.metrics() | {"loss": (output.numerator / output.denominator).item()}
    for name, value in CASES[case]["expected"].items():
        assert metrics[name] == pytest.approx(value, abs=1e-6, rel=2e-6), name


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_cpu(name, device):
    (here, grad_here), (there, grad_there) = (run(random_inputs(each), CONFIGS[name]) for each in ("cpu", device))
    assert int(there.denominator) == int(here.denominator)
    assert there.numerator.item() == pytest.approx(here.numerator.item(), rel=1e-5, abs=1e-5)
    assert relative_difference(grad_there, grad_here) <= 1e-5
    assert relative_difference(there.future_kl, here.future_kl) <= 1e-5
    assert relative_difference(there.weight, here.weight) <= 1e-5
    found, expected = there.statistics.metrics(), here.statistics.metrics()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Quantiles come from bins 2.9 % wide, whose edges may differ by a rounding.
        tolerance = 3e-2 if "_q" in key else 1e-5
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-6), key
    if name == "fipo":
        assert found["dropped_sequences"] == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_host_never_waits(name, device):
    inputs = random_inputs(device)
    run(inputs, CONFIGS[name])
    with no_sync():
        SequenceShards.build(LENGTHS, device=device)
        run(inputs, CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits_twice(name, device):
    inputs = random_inputs(device)
    (first, grad_first), (second, grad_second) = (run(inputs, CONFIGS[name]) for _ in range(2))
    assert torch.equal(grad_first, grad_second)
    for field in ("numerator", "future_kl", "weight"):
        assert torch.equal(getattr(first, field), getattr(second, field)), field
    for field in ("sums", "maxima", "histograms"):
        assert torch.equal(getattr(first.statistics, field), getattr(second.statistics, field)), field


@pytest.mark.parametrize("half_life", [32.0, 1082.0, float("inf")])
@pytest.mark.parametrize("length", [1, 31, 1000, 20_480])
def test_scan_computes_in_float64(half_life, length, device):
    values = torch.randn(2 * length, generator=torch.Generator().manual_seed(length)).to(device)
    ends = torch.tensor([length - 1, 2 * length - 1], device=device)
    got = suffix_scan(values, discount(half_life), ends)
    assert got.dtype == torch.float64
    want, following = values.cpu().double().view(2, length).numpy(), np.zeros(2)
    for t in range(length - 1, -1, -1):
        want[:, t] = following = want[:, t] + discount(half_life) * following
    error = np.abs(got.cpu().numpy().reshape(2, length) - want).max() / np.abs(want).max()
    assert error <= 1e-12
    rounded = future_kl(values.view(2, length), half_life)
    assert rounded.dtype == torch.float32
    assert np.abs(rounded.cpu().numpy() - want).max() <= 1e-6 * np.abs(want).max()
