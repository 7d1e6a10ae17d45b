"""Weight decay by parameter, the learning rates of the schedule, and mixed-precision steps."""

import pytest
import torch

from fipo_megatron.actor import parallel
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.optimizer import build_optimizer, wrap_for_training
from fipo_megatron.config import ActorConfig, OptimizerConfig, ParallelConfig
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import random_model


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


def build(layout, **settings):
    actor = ActorConfig(**({"dtype": "float32"} | settings))
    architecture = Architecture.from_hf(random_model("qwen2").config.to_dict())
    wrapped = wrap_for_training(build_model(architecture, actor, layout), actor)
    return wrapped[0], *build_optimizer(wrapped, actor)


@pytest.mark.parametrize("distributed", [False, True])
def test_biases_and_norms_do_not_decay(distributed, layout):
    settings = OptimizerConfig(lr=0.5, weight_decay=0.1, warmup_steps=0, clip_grad=0.0)
    model, optimizer, schedule = build(layout, optimizer=settings, distributed_optimizer=distributed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    schedule.step(1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if parameter.ndim == 1 else 1 - 0.5 * 0.1
        torch.testing.assert_close(parameter, kept * before[name])
    assert any(name.endswith("linear_qkv.bias") for name in before)


def rates(layout, steps, **settings):
    _, optimizer, schedule = build(layout, optimizer=OptimizerConfig(lr=8.0, **settings))
    found = []
    for _ in range(steps):
        schedule.step(1)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_learning_rates(layout):
    warm = {"warmup_steps": 4}
    assert rates(layout, 6, **warm) == pytest.approx([2, 4, 6, 8, 8, 8])
    assert rates(layout, 2, warmup_steps=0) == [8, 8]
    assert rates(layout, 7, **warm, schedule="linear", decay_steps=6, min_lr=2.0) == pytest.approx(
        [2, 4, 6, 8, 5, 2, 2]
    )
    assert rates(layout, 7, **warm, schedule="cosine", decay_steps=6) == pytest.approx([2, 4, 6, 8, 4, 0, 0])


@pytest.mark.parametrize("distributed", [False, True])
def test_bfloat16_trains_float32_main_parameters(distributed, layout):
    """A hundred steps add up, each too small for bfloat16, which has 8 bits of precision."""
    settings = OptimizerConfig(lr=1e-4, weight_decay=0.0, warmup_steps=0)
    model, optimizer, schedule = build(layout, dtype="bfloat16", optimizer=settings, distributed_optimizer=distributed)
    norm = model.module.decoder.final_layernorm.weight
    for _ in range(100):
        schedule.step(1)
        norm.main_grad.fill_(1.0)
        optimizer.step()
    assert norm.dtype == torch.bfloat16
    torch.testing.assert_close(norm.float(), torch.full((32,), 0.99), atol=2e-3, rtol=0)


def test_optimizer_of_megatron_by_name(layout):
    _, optimizer, _ = build(
        layout, distributed_optimizer=False, megatron_optimizer={"optimizer": "sgd", "sgd_momentum": 0.0}
    )
    assert isinstance(optimizer.chained_optimizers[0].optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.0


def test_experts_are_marked_for_the_gradient_norm(layout):
    """Transformer Engine's GroupedLinear leaves the attribute out from version 2.13 on."""
    actor = ActorConfig(dtype="float32", distributed_optimizer=False)
    architecture = Architecture.from_hf(random_model("qwen3 moe").config.to_dict())
    chunks = build_model(architecture, actor, layout)
    experts = [parameter for name, parameter in chunks[0].named_parameters() if ".experts." in name]
    for parameter in experts:
        del parameter.tensor_model_parallel
    wrap_for_training(chunks, actor)
    assert experts
    assert all(parameter.tensor_model_parallel for parameter in experts)
    assert not getattr(chunks[0].decoder.layers[0].mlp.router.weight, "tensor_model_parallel", False)
