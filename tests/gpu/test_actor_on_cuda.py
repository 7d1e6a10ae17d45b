"""MegatronActor alone on a GPU over NCCL: the layers of torch, those of Transformer Engine, and FP8.

Measurements are printed (``pytest -rP``) and kept in the JUnit report, whether or not they are within the bounds.
"""

import math

import pytest
import torch

from benchmarks.actor_worker import Setup, architecture
from fipo_megatron.actor.fp8 import scaling_state
from fipo_megatron.actor.megatron_config import transformer_engine_found
from fipo_megatron.config import ActorConfig
from tests.actor import hf_reference
from tests.gpu import fp8_rounding
from tests.gpu.actors import FAMILIES, Case, distance, one_rank

needs_transformer_engine = pytest.mark.skipif(
    not transformer_engine_found(), reason="needs Transformer Engine, which is not installed here"
)
BF16 = {"dtype": "bfloat16", "distributed_optimizer": True}
FUSED = BF16 | {"transformer": {"transformer_impl": "transformer_engine"}}
UNBOUNDED = {"max_noise_shift": 1e9, "max_noise_future_kl": 1e9}
RECIPES = {"blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}


@pytest.fixture
def build(device):
    """Builds a Case."""

    def make(name="qwen3", **changes):
        case = Case(name, **changes)
        assert case.layout.device == device
        return case

    return make


@pytest.fixture
def report(record_property):
    def put(**values):
        for name, value in values.items():
            record_property(name, value)
            print(f"{name} = {value:.3g}")

    return put


def differences(got, want):
    return {"largest": float((got - want).abs().max()), "mean": float((got - want).abs().mean())}


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_transformers_in_float32(name, build, report):
    case = build(name)
    expected = case.reference.expected
    log_probs = differences(case.response_log_probs(), torch.cat(expected.log_probs))
    wanted = hf_reference.full_tensors(expected.gradients, case.reference.architecture, case.actor.chunks[0].vocab_size)
    worst, together = distance(case.gradients(case.old_log_probs()), named_as_built(wanted, case))
    report(log_prob_difference=log_probs["largest"], worst_gradient=worst, gradient=together)
    assert log_probs["largest"] <= 1e-4
    assert worst <= 1e-3
    assert together <= 1e-4


def named_as_built(wanted, case):
    """A tied output weight has no name of its own."""
    return {name: tensor for name, tensor in wanted.items() if name != "output_layer.weight" or not tied(case)}


def tied(case):
    return case.reference.architecture.tied


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_log_probs_are_close_to_transformers(name, build, report):
    case = build(name, **BF16)
    found = differences(case.response_log_probs(), torch.cat(case.reference.expected.log_probs))
    report(log_prob_difference=found["largest"], mean_difference=found["mean"])
    assert found["largest"] <= 0.15
    assert found["mean"] <= 0.03


@pytest.mark.parametrize("changes", [{}, BF16, BF16 | {"recompute": "full"}], ids=["float32", "bfloat16", "recompute"])
def test_noise_floor_is_nothing(changes, build, report):
    """The kernels are deterministic in forward: two passes at equal weights give the same bits on one GPU."""
    case = build(**(changes | UNBOUNDED))
    floor = case.actor.check_noise_floor(case.plan[0], case.trajectories)
    report(noise_shift=floor.shift, noise_future_kl=floor.future_kl)
    assert floor.shift <= 1e-6
    assert floor.future_kl <= 1e-5


def test_a_perturbed_weight_shows_in_the_noise_floor(build):
    case = build()
    old = case.log_probs()
    with torch.no_grad():
        case.actor.parameters()[7].view(-1)[3] += 0.5
    assert case.actor.noise_floor(case.plan[0], case.trajectories, old).shift > 1e-4


@pytest.mark.parametrize("changes", [{}, BF16], ids=["float32", "bfloat16"])
def test_training_steps(changes, build, report):
    case = build(**changes)
    old = case.log_probs()
    first, second = case.update(old), case.update(old)
    report(grad_norm=first.grad_norm, shift_after_a_step=second.statistics["shift_abs_max"])
    assert (first.skipped, second.skipped) == ("", "")
    assert first.denominator == sum(int(t.mask.sum()) for t in case.trajectories)
    assert first.statistics["shift_abs_max"] <= 1e-6
    assert second.statistics["shift_abs_max"] > 1e-3
    assert second.loss < first.loss


def test_grad_norm_is_that_of_transformers(build):
    case = build()
    metrics = case.update(case.old_log_probs())
    assert metrics.grad_norm == pytest.approx(case.reference.expected.grad_norm, rel=1e-4)
    assert metrics.loss == pytest.approx(case.reference.expected.loss, rel=1e-4)


def test_non_finite_gradient_changes_nothing(build):
    case = build(**BF16)
    before = [p.detach().clone() for p in case.actor.parameters()]
    hook = case.actor.parameters()[3].register_hook(lambda gradient: gradient * math.inf)
    assert case.update(case.log_probs()).skipped == "non-finite gradient"
    hook.remove()
    assert all(torch.equal(*pair) for pair in zip(before, case.actor.parameters(), strict=True))
    assert not case.update(case.log_probs()).skipped


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_offload_frees_device_memory_and_changes_nothing(distributed_optimizer, build, report):
    case = build(dtype="bfloat16", distributed_optimizer=distributed_optimizer)
    case.update(case.log_probs())
    actor = case.actor
    everything = [*actor.parameters(), *actor.optimizer_state()]
    before = [tensor.detach().cpu() for tensor in everything]
    log_probs = case.response_log_probs()
    parameters = sum(p.numel() for p in actor.parameters())
    held = torch.cuda.memory_allocated()
    with actor.offloaded() as freed:
        gone = held - torch.cuda.memory_allocated()
        assert gone >= 0.99 * freed  # the optimizer counts its steps on the host
        assert gone >= (2 + 4 + 4 + 8) * parameters, "bfloat16 weights, float32 gradients, main weights, two moments"
    report(freed_bytes=gone, parameters=parameters)
    assert abs(torch.cuda.memory_allocated() - held) <= 2**20
    assert all(torch.equal(old, now.detach().cpu()) for old, now in zip(before, everything, strict=True))
    assert torch.equal(log_probs, case.response_log_probs())
    assert not case.update(case.log_probs()).skipped


@needs_transformer_engine
@pytest.mark.parametrize("name", FAMILIES)
def test_transformer_engine_layers_are_close_to_those_of_torch(name, build, report):
    case = build(name, **BF16)
    torch_log_probs, torch_gradients = case.response_log_probs(), case.gradients(case.old_log_probs())
    case = build(name, **FUSED)
    found = differences(case.response_log_probs(), torch_log_probs)
    worst, together = distance(case.gradients(case.old_log_probs()), torch_gradients)
    report(log_prob_difference=found["largest"], mean_difference=found["mean"], gradient=together, worst_gradient=worst)
    assert found["largest"] <= 0.15
    assert found["mean"] <= 0.03
    assert together <= 0.1


@needs_transformer_engine
@pytest.mark.parametrize("fp8", [{}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}], ids=["bfloat16", "fp8"])
def test_noise_floor_of_a_mixture_of_experts_is_nothing(fp8, device, report):
    """Tokens return from their experts in a fixed order: the fused permutation is the default on CUDA."""
    setup = Setup.build(architecture(1024, 2, mixture=True), {}, FUSED | UNBOUNDED | fp8, one_rank())
    trajectories, plan = setup.batch([384, 128, 200, 56], 768)
    floor = setup.actor.check_noise_floor(plan[0], trajectories)
    (metrics,) = setup.actor.update(plan, trajectories, setup.actor.log_probs(plan, trajectories))
    report(noise_shift=floor.shift, noise_future_kl=floor.future_kl, grad_norm=metrics.grad_norm)
    assert not metrics.skipped
    assert floor.shift <= 1e-6


@needs_transformer_engine
def test_noise_floor_of_transformer_engine_layers(build, report):
    case = build(**(FUSED | UNBOUNDED))
    floor = case.actor.check_noise_floor(case.plan[0], case.trajectories)
    report(noise_shift=floor.shift, noise_future_kl=floor.future_kl)
    assert floor.shift <= ActorConfig().max_noise_shift
    assert floor.future_kl <= ActorConfig().max_noise_future_kl


def build_fp8(build, recipe, **changes):
    return build(**(FUSED | UNBOUNDED | {"fp8": RECIPES[recipe], "fp8_recipe": recipe} | changes))


@needs_transformer_engine
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_log_probs_and_noise_floor(recipe, build, report):
    """FP8 changes the log-probs by as much as the rounding of the products' inputs does, and by no less: it is on."""
    rounding = float(fp8_rounding.log_prob_differences("qwen3", recipe).abs().mean())
    bf16 = build(**FUSED).response_log_probs()
    case = build_fp8(build, recipe)
    case.gradients(case.log_probs())  # under delayed scaling the first training pass finds the scales
    found, floor = differences(case.response_log_probs(), bf16), case.noise_floor()
    report(
        log_prob_difference=found["largest"],
        mean_difference=found["mean"],
        mean_difference_by_rounding=rounding,
        noise_shift=floor.shift,
        noise_future_kl=floor.future_kl,
    )
    assert 0.6 * rounding <= found["mean"] <= 1.4 * rounding
    # Delayed scaling changes its scales between the micro-batches of a training pass: it has a floor, and is reported.
    assert floor.shift <= (1.0 if recipe == "delayed" else ActorConfig().max_noise_shift)


@needs_transformer_engine
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_training_steps(recipe, build):
    case = build_fp8(build, recipe)
    case.gradients(case.log_probs())
    old = case.log_probs()
    first, second = case.update(old), case.update(old)
    assert (first.skipped, second.skipped) == ("", "")
    assert second.statistics["shift_abs_max"] > 1e-3


@needs_transformer_engine
@pytest.mark.parametrize("recipe", RECIPES)
def test_recompute_under_fp8_gives_the_same_gradient(recipe, build, report):
    """Each recomputed region uses the scales of its own forward pass, not those of an earlier log-prob pass."""
    gradients = []
    for recompute in ("none", "full"):
        case = build_fp8(build, recipe, recompute=recompute)
        for _ in range(2):  # the scales of the second update differ from those of the first
            old = case.log_probs()
            assert not case.update(old).skipped
        gradients.append(case.gradients(case.log_probs()))
    worst, together = distance(gradients[1], gradients[0])
    report(worst_gradient=worst, gradient=together)
    assert together <= 1e-3


@needs_transformer_engine
def test_log_prob_pass_leaves_delayed_scaling_as_it_was(build):
    case = build_fp8(build, "delayed")
    case.update(case.log_probs())
    before = [tensor.clone() for tensor in scaling_state(case.actor.chunks)]
    assert before
    first, second = case.response_log_probs(), case.response_log_probs()
    assert torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(before, scaling_state(case.actor.chunks), strict=True))


@needs_transformer_engine
def test_offload_frees_the_fp8_copies_of_the_weights(build):
    case = build_fp8(build, "blockwise")
    case.update(case.log_probs())
    log_probs = case.response_log_probs()
    with case.actor.offloaded():
        copies = [getattr(module, "_fp8_workspaces", {}) for module in case.actor.chunks[0].modules()]
        assert not any(copies)
    assert torch.equal(log_probs, case.response_log_probs())
