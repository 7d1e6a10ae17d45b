"""FLOPs by formula, and rates."""

import json
from pathlib import Path

import pytest

from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.observe.throughput import balance, matrix_parameters, model_flops, sequence_cost, throughput
from fipo_megatron.weights.architecture import Architecture

CONFIGS = Path(__file__).parents[1] / "weights" / "configs"


def architecture(name):
    return Architecture.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-32B", 31.98), ("Qwen3-30B-A3B", 3.04), ("Qwen2.5-0.5B", 0.494)],
)
def test_parameters_that_a_token_is_multiplied_with(name, billions):
    """32.76 B without its embedding of 152,064 × 5,120; the 8 chosen of 128 experts; a tied embedding is the output."""
    assert matrix_parameters(architecture(name)) / 1e9 == pytest.approx(billions, rel=0.005)


def test_attention_grows_with_the_square():
    shape = architecture("Qwen2.5-32B")
    linear = 2 * matrix_parameters(shape)
    quadratic = (model_flops(shape, [20480]) - linear * 20480) / 20480**2
    assert quadratic == pytest.approx(2 * 64 * 40 * 128)
    assert model_flops(shape, [100, 200]) == model_flops(shape, [100]) + model_flops(shape, [200])


def test_weights_of_the_matrix_products_by_hand():
    """Per layer 2·q·h + 2·kv·h + 3·h·ffn, and the output layer; a mixture has a router and k experts instead."""
    dense, mixture = architecture("Qwen2.5-32B"), architecture("Qwen3-30B-A3B")
    attention = 2 * 5120 * (40 + 8) * 128
    assert matrix_parameters(dense) == 64 * (attention + 3 * 5120 * 27648) + 5120 * 152064
    attention = 2 * 2048 * (32 + 4) * 128
    assert matrix_parameters(mixture) == 48 * (attention + 128 * 2048 + 8 * 3 * 2048 * 768) + 2048 * 151936


def test_a_sequence_costs_its_model_flops():
    shape = architecture("Qwen2.5-7B")
    assert sequence_cost(shape).of(4321) == model_flops(shape, [4321])


def test_ranks_wait_for_the_most_expensive():
    shape, lengths = architecture("Qwen2.5-7B"), [20_000, 10_000, 10_000]
    plan = [MiniBatch((((0,),), ((1, 2),)))]
    flops = [model_flops(shape, [20_000]), model_flops(shape, [10_000, 10_000])]
    found = balance(plan, lengths, shape)
    assert found["throughput/cost_imbalance"] == pytest.approx(flops[0] / (sum(flops) / 2))
    assert found["throughput/idle_fraction"] == pytest.approx((flops[0] - sum(flops) / 2) / flops[0])


def test_rates():
    found = throughput(generated=600, generating=3, trained=1000, training=2, step=10, flops=4e12, peak=8e12)
    assert found == {
        "throughput/generated_tokens_per_second": 200,
        "throughput/trained_tokens_per_second": 500,
        "throughput/tokens_per_second": 100,
        "throughput/mfu": 0.25,
    }
    found = throughput(generated=None, generating=0, trained=10, training=0, step=1, flops=1, peak=None)
    assert found == {"throughput/trained_tokens_per_second": None, "throughput/tokens_per_second": 10}
