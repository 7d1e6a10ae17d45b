"""The routers' auxiliary losses against their derivative by hand; the layout matrix has them under every layout."""

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from fipo_megatron.actor import parallel
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.router_losses import MiniBatchRouter, measured_loads, routers
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import random_model

EXPERTS, TOP_K, TOKENS = 4, 2, 12
BALANCE, Z = 0.3, 0.02


@pytest.fixture(scope="module", autouse=True)
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


def build(layout, **transformer):
    architecture = Architecture.from_hf(random_model("qwen3 moe").config.to_dict())
    return build_model(architecture, ActorConfig(dtype="float32", transformer=transformer), layout)


def gradient_by_hand(logits_TE, balance=BALANCE, z=Z):
    """d/dl_j of balance · E · Σ_i f_i p_i + z · logsumexp(l)², in float64."""
    logits_TE = logits_TE.double()
    load_E = torch.zeros(EXPERTS, dtype=torch.float64)
    for row in logits_TE.tolist():
        for expert in sorted(range(EXPERTS), key=row.__getitem__)[-TOP_K:]:
            load_E[expert] += 1 / (TOP_K * len(logits_TE))
    p_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    mean_T1 = (p_TE @ load_E)[:, None]
    log_sum_T1 = logits_TE.exp().sum(1, keepdim=True).log()
    return balance * EXPERTS * p_TE * (load_E - mean_T1) + 2 * z * log_sum_T1 * p_TE


@pytest.mark.parametrize("kind", ["aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 0, 11]])
def test_gradient_does_not_depend_on_micro_batches_or_padding(sizes, kind, layout):
    [router, *_] = routers(
        build(layout, moe_aux_loss_coeff=BALANCE, moe_z_loss_coeff=Z, moe_router_load_balancing_type=kind)
    )
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4)) * 2
    micros = []
    for part_TE in logits_TE.split(sizes):
        padded_SBE = torch.cat([part_TE, torch.full((3, EXPERTS), 9.0)])[:, None].requires_grad_()
        micros.append((padded_SBE, torch.arange(len(padded_SBE))[:, None] >= len(part_TE)))
    with torch.no_grad(), measured_loads([router]):
        for micro_SBE, padding in micros:
            router.routing(micro_SBE, padding)
    for micro_SBE, padding in micros:
        probs, _ = router.routing(micro_SBE, padding)
        (0.0 * probs).sum().backward()
    found_TE = torch.cat([micro_SBE.grad[:-3, 0] for micro_SBE, _ in micros])
    torch.testing.assert_close(found_TE.double(), gradient_by_hand(logits_TE), rtol=1e-5, atol=1e-6)
    assert all(not micro_SBE.grad[-3:].any() for micro_SBE, _ in micros)


def test_loads_must_be_measured_first(layout):
    [router, *_] = routers(build(layout, moe_aux_loss_coeff=BALANCE))
    with pytest.raises(RuntimeError, match="load_E: missing"):
        router.routing(torch.zeros(2, 1, EXPERTS))


@pytest.mark.parametrize(
    "transformer",
    [{}, {"moe_aux_loss_coeff": 0.0}, {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "none"}],
)
def test_without_losses_the_router_is_that_of_megatron(transformer, layout):
    [chunk] = build(layout, **transformer)
    assert not routers([chunk])
    assert sum(type(module) is TopKRouter for module in chunk.modules()) == 2


@pytest.mark.parametrize("name", ["routing", "apply_z_loss", "is_aux_loss_enabled"])
def test_megatron_has_the_methods_that_are_replaced(name):
    """A renamed method would leave Megatron's own loss on beside ours."""
    assert name in vars(TopKRouter)
    assert name in vars(MiniBatchRouter)
