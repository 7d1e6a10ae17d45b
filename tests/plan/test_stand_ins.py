"""The bytes that stand-ins for Transformer Engine's layers keep for backward, against a count by hand."""

from dataclasses import replace

import pytest

from fipo_megatron.config import ActorConfig, Config, DataConfig, ParallelConfig, RewardConfig, RolloutConfig
from fipo_megatron.plan.tracing import Tracer
from fipo_megatron.weights.architecture import Architecture

T = 1024
H, F, HEADS, GROUPS, D = 256, 640, 8, 4, 32
Q, KV = HEADS * D, GROUPS * D
SCALED = 1 + 4 / 128
"""Bytes per value in FP8, with its share of a float32 scale per 128 values."""

DENSE = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": H,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": F,
    "vocab_size": 512,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-6,
}
MODEL = Architecture.from_hf(DENSE)
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": H,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": D,
    "intermediate_size": F,
    "vocab_size": 512,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}

# Bytes of a layer: tensors by name, all of this rank's tokens.
RESIDUALS = {"input": 2 * T * H, "after attention": 2 * T * H}
NORMS = {"rsigma of both norms": 2 * 4 * T}
ATTENTION = {
    "query and key with rotary embedding": 2 * T * (Q + KV),
    "value": 2 * T * KV,
    "output": 2 * T * Q,
    "log-sum-exp": 4 * T * HEADS,
}
PRODUCTS = {
    "input of QKV": 2 * T * H,
    "input of the gate": 2 * T * H,
    "gate and up": 2 * T * 2 * F,
    "input of down": 2 * T * F,
}


def configuration(**changes):
    return Config(
        actor=ActorConfig(token_budget=T, log_prob_chunk_tokens=128, **changes),
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(max_response_tokens=T - 8),
        reward=RewardConfig(overlong_buffer_tokens=0),
    )


def total(*parts):
    return sum(size for part in parts for size in part.values())


@pytest.fixture(scope="module")
def tracer():
    with Tracer(workers=1) as tracer:
        yield tracer


def cost(tracer, model=MODEL, **changes):
    return tracer.layer(configuration(**changes), model, "transformer_engine").result()


@pytest.mark.processes
def test_a_layer_keeps_what_its_tensors_take(tracer):
    assert cost(tracer).per_layer == total(RESIDUALS, NORMS, ATTENTION, PRODUCTS)


@pytest.mark.processes
def test_the_activation_of_transformer_engine_is_traced_as_the_fused_one(tracer):
    """Megatron-Core accepts only one of both."""
    given = {"use_te_activation_func": True, "bias_activation_fusion": False}
    assert cost(tracer, transformer=given).per_layer == total(RESIDUALS, NORMS, ATTENTION, PRODUCTS)


@pytest.mark.processes
def test_norms_of_queries_and_keys_keep_them_alone(tracer):
    """Not the product of QKV, of which they are parts."""
    qwen3 = Architecture.from_hf(DENSE | {"architectures": ["Qwen3ForCausalLM"], "head_dim": D})
    more = {"queries and keys": 2 * T * (Q + KV), "rsigma": 4 * T * (HEADS + GROUPS)}
    assert cost(tracer, qwen3).per_layer == total(RESIDUALS, NORMS, ATTENTION, PRODUCTS, more)


@pytest.mark.processes
def test_in_fp8_inputs_of_products_take_a_byte_per_value(tracer):
    inputs = T * (H + H + F)  # of QKV, of gate and up, of down
    saved = 2 * inputs - SCALED * inputs
    more = SCALED * T * Q  # the input of the output projection, beside attention's own copy in bfloat16
    assert cost(tracer, fp8="hybrid").per_layer == total(RESIDUALS, NORMS, ATTENTION, PRODUCTS) - saved + more


@pytest.mark.processes
def test_recompute_keeps_the_inputs_alone(tracer):
    selective = cost(tracer, recompute="selective")
    assert selective.per_layer == total(RESIDUALS, ATTENTION) + 4 * T + 2 * T * H  # one norm, the input of QKV
    assert cost(tracer, recompute="full").per_layer == 2 * T * H


@pytest.mark.processes
def test_parallel_ranks_keep_their_parts(tracer):
    whole = cost(tracer)
    split = ParallelConfig(tensor_parallel=4, sequence_parallel=True)
    assert cost(tracer, parallel=split).per_layer == whole.per_layer / 4
    assert cost(tracer, parallel=ParallelConfig(context_parallel=2)).per_layer == whole.per_layer / 2


@pytest.mark.processes
def test_experts_keep_the_rows_of_their_tokens(tracer):
    mixture = Architecture.from_hf(MIXTURE)
    narrow, wide = (
        cost(tracer, replace(mixture, mixture=replace(mixture.mixture, ffn=ffn))).per_layer for ffn in (96, 192)
    )
    rows = 2 * T  # each token goes to two experts
    added = 2 * rows * 3 * 96  # gate and up, and the input of down
    assert wide - narrow == pytest.approx(added, abs=64)
    assert cost(tracer, mixture, parallel=ParallelConfig(expert_parallel=4)).per_layer == pytest.approx(
        cost(tracer, mixture).per_layer, rel=0.02
    )


@pytest.mark.processes
def test_weight_copies_of_fp8(tracer):
    from fipo_megatron.plan.rank_kinds import rank_kinds

    (kind,) = rank_kinds(MODEL, ParallelConfig(), 1)
    config = configuration(fp8="e4m3", fp8_bf16_first_last=1)
    traced = tracer.rank(config, MODEL, kind, 1, "transformer_engine").result()
    layer = H * (Q + 2 * KV) + Q * H + 3 * H * F
    assert traced.weight_copies == 2 * 2 * layer  # two of four layers, in both orientations


@pytest.mark.processes
def test_packages_of_the_gpu_are_not_imported(tmp_path, monkeypatch):
    for name in ("transformer_engine", "apex", "flash_attn"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with Tracer(workers=1) as tracer:
        assert cost(tracer).per_layer > 0
