"""The model that Megatron builds from config.json equals that of transformers; errors are raised before building."""

import json

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from fipo_megatron.actor import parallel
from fipo_megatron.actor.gated_silu import gated_silu
from fipo_megatron.actor.megatron_config import check, transformer_config
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.rotary import inverse_frequencies
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights.architecture import FAMILIES, Architecture
from tests.actor import hf_reference
from tests.actor.models import MODELS, logits, random_model

FLOAT32 = ActorConfig(dtype="float32")
LENGTHS = (100, 7, 33)
"""Lengths of the sequences; most positions of the first exceed an original context of 32."""


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


def architecture_of(reference):
    return Architecture.from_hf(reference.config.to_dict())


def build(reference, layout, actor=FLOAT32):
    architecture = architecture_of(reference)
    [model] = build_model(architecture, actor, layout)
    hf_reference.load(model, reference.state_dict(), architecture, layout)
    return model


@pytest.mark.parametrize("name", ["qwen3", "qwen3 moe"])
def test_every_mlp_has_the_own_activation_which_changes_no_bit(name, layout):
    reference = random_model(name)
    megatrons = ActorConfig(dtype="float32", transformer={"use_te_activation_func": False})
    own, other = build(reference, layout), build(reference, layout, megatrons)
    found = [module.activation_func for module in own.modules() if isinstance(module, MLP)]
    assert len(found) == (2 * 4 if name == "qwen3 moe" else 2)
    assert all(function is gated_silu for function in found)
    for a, b in zip(logits(own, sequences()), logits(other, sequences()), strict=True):
        assert torch.equal(a, b)


def sequences(vocab=61, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, layout):
    reference = random_model(name)
    model = build(reference, layout)
    with torch.no_grad():
        for ids, mine in zip(sequences(), logits(model, sequences(), padding=5), strict=True):
            torch.testing.assert_close(mine, reference(ids[None]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "qwen3 moe", "qwen3 moe, not normalised"])
def test_gradients_are_those_of_transformers(name, layout):
    reference = random_model(name)
    model = build(reference, layout)
    weights = [torch.randn(length, 61, generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    sum((w * mine).sum() for w, mine in zip(weights, logits(model, sequences()), strict=True)).backward()
    sum((w * reference(ids[None]).logits[0]).sum() for w, ids in zip(weights, sequences(), strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected = hf_reference.full_tensors(gradients, architecture_of(reference), model.vocab_size)
    for parameter_name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[parameter_name]).norm() / expected[parameter_name].norm()
        assert difference <= 1e-5, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies_are_exactly_those_of_transformers(name):
    reference = random_model(name)
    rope, head_dim = architecture_of(reference).rope, architecture_of(reference).head_dim
    assert torch.equal(inverse_frequencies(rope, head_dim), reference.model.rotary_emb.inv_freq)
    assert rope.attention_factor == reference.model.rotary_emb.attention_scaling


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [
        (1e6, None),
        (1e6, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        (1e6, {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
        (
            5e5,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rope_of_real_models_as_transformers_4_wrote_it(theta, scaling):
    """The head dimension is 128, as in the published config.json; transformers 5 reads the same file."""
    reference = random_model("llama2", head_dim=128, max_position_embeddings=32768)
    old = reference.config.to_dict()
    del old["rope_parameters"]
    old |= {"rope_theta": theta, "rope_scaling": scaling}
    rotary = type(reference.model.rotary_emb)(type(reference.config).from_dict(old))
    rope = Architecture.from_hf(old).rope
    assert torch.equal(inverse_frequencies(rope, 128), rotary.inv_freq)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-15)


def test_vocabulary_is_padded(layout):
    reference = random_model("qwen2")
    model = build(reference, layout, ActorConfig(dtype="float32", vocab_multiple=64))
    assert model.output_weight().shape == (64, 32)
    assert model.true_vocab_size == 61
    with torch.no_grad():
        [mine] = logits(model, sequences()[:1])
        torch.testing.assert_close(mine, reference(sequences()[0][None]).logits[0], atol=1e-5, rtol=0)


def test_bfloat16_model_is_bfloat16_throughout(layout):
    reference = random_model("qwen3 moe")
    model = build(reference, layout, ActorConfig(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        [mine] = logits(model, sequences()[:1])
        assert mine.dtype == torch.bfloat16
        expected = reference(sequences()[0][None]).logits[0]
    assert (mine - expected).norm() / expected.norm() <= 0.05


@pytest.mark.parametrize("name", ["qwen3", "qwen3 moe, some dense"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(name, recompute, layout):
    gradients = []
    for actor in (FLOAT32, ActorConfig(dtype="float32", recompute=recompute)):
        model = build(random_model(name), layout, actor).train()
        logits(model, sequences())[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_directory(tmp_path):
    reference = random_model("qwen3")
    reference.config.save_pretrained(tmp_path)
    assert Architecture.from_directory(tmp_path) == architecture_of(reference)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        Architecture.from_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        Architecture.from_directory(tmp_path / "nowhere")


def config_json(name, **changes):
    return random_model(name).config.to_dict() | changes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"architectures": ["GemmaForCausalLM"]}, "supported are " + ", ".join(FAMILIES)),
        ("qwen2", {"architectures": None}, "supported are " + ", ".join(FAMILIES)),
        ("qwen2", {"hidden_size": None}, "hidden_size: missing"),
        ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads: missing"),
        ("qwen3", {"head_dim": None}, "head_dim: missing"),
        ("qwen3 moe", {"num_experts": None, "num_local_experts": None}, "num_experts: missing"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True: not supported"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = .* must be a list of 'full_att",
        ),
        ("qwen2", {"layer_types": 3}, "layer_types = 3: must be a list of 'full_attention'"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*fp8.*: not supported"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            "dual_chunk_attention_config = .*: not supported",
        ),
        ("llama2", {"attention_bias": True}, "attention_bias = True: not supported"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope type 'longrope': supported are default, linear",
        ),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor of rope type 'llama3'"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
    ],
)
def test_config_json_that_cannot_be_built(name, changes, message):
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf(config_json(name, **changes))


def test_all_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"hidden_size: missing\n(.*\n)*.*rms_norm_eps: missing"):
        Architecture.from_hf({"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize(
    ("name", "parallelism", "message"),
    [
        (
            "qwen2",
            {"tensor_parallel": 3},
            r"tensor_parallel = 3: must divide the model's attention heads, 4; valid: 1, 2\n",
        ),
        ("qwen2", {"tensor_parallel": 4}, r"tensor_parallel = 4: must divide the model's KV heads, 2; valid: 1, 2"),
        ("qwen2", {"pipeline_parallel": 3}, r"pipeline_parallel = 3, virtual_pipeline = 1: .* 2 layers; valid: 1, 2"),
        ("qwen2", {"pipeline_parallel": 2, "virtual_pipeline": 2}, r"virtual_pipeline = 2: their product must divide"),
        ("qwen2", {"expert_parallel": 2}, "expert_parallel = 2.*must not be set, Qwen2ForCausalLM is a dense model"),
        (
            "qwen3 moe",
            {"expert_parallel": 3},
            "expert_parallel = 3: must divide the model's experts, 4; valid: 1, 2, 4",
        ),
        ("qwen3 moe", {"tensor_parallel": 2}, "sequence_parallel = False: must be true for a mixture of experts"),
        (
            "qwen3 moe",
            {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 1},
            "expert_tensor_parallel = 1: must be tensor_parallel = 2 while expert_parallel = 1",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_model(name, parallelism, message):
    with pytest.raises(ValueError, match=message):
        check(architecture_of(random_model(name)), ActorConfig(parallel=ParallelConfig(**parallelism)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fp8": "hybrid"},
            "actor.fp8 = hybrid: needs CUDA and Transformer Engine, which are not available; valid: off",
        ),
        (
            {"transformer": {"transformer_impl": "transformer_engine"}},
            "Transformer Engine is not available; valid: local",
        ),
    ],
)
def test_needs_transformer_engine(settings, message):
    with pytest.raises(ValueError, match=message):
        check(architecture_of(random_model("qwen2")), ActorConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"transformer": {"moe_aux_loss_coef": 0.1}},
            "actor.transformer.moe_aux_loss_coef = 0.1: Megatron-Core's TransformerConfig has no such field; did you "
            "mean moe_aux_loss_coeff",
        ),
        ({"ddp": {"zzz": 1}}, "actor.ddp.zzz = 1: Megatron-Core's DistributedDataParallelConfig has no such field$"),
        ({"transformer": {"num_layers": 3}}, "num_layers = 3: cannot be set here, it follows from the model"),
        ({"transformer": {"tensor_model_parallel_size": 1}}, "tensor_model_parallel_size = 1: cannot be set here"),
        ({"ddp": {"use_distributed_optimizer": True}}, "use_distributed_optimizer = True: cannot be set here"),
        ({"megatron_optimizer": {"lr": 1.0}}, "actor.megatron_optimizer.lr = 1.0: cannot be set here"),
        ({"ddp": {"overlap_param_gather": True}}, "overlap_param_gather = True: cannot be set here"),
        ({"ddp": {"use_megatron_fsdp": True}}, "use_megatron_fsdp = True: cannot be set here"),
        ({"transformer": {"rotary_interleaved": True}}, "rotary_interleaved = True: cannot be set here"),
        ({"transformer": {"moe_router_score_function": "sigmoid"}}, "score_function = 'sigmoid': cannot be set here"),
        ({"transformer": {"init_method": "normal"}}, "init_method = 'normal': is a function of Megatron-Core's"),
        ({"transformer": {"moe_aux_loss_coeff": "x"}}, "moe_aux_loss_coeff = 'x': must be a valid number"),
        ({"transformer": {"recompute_num_layers": "two"}}, "recompute_num_layers = 'two': must be a valid integer"),
        (
            {"transformer": {"bias_activation_fusion": "false"}},
            "bias_activation_fusion = 'false': must be False, not text",
        ),
        ({"transformer": {"recompute_num_layers": "2"}}, "recompute_num_layers = '2': must be 2, not text"),
        ({"transformer": {"attention_backend": "warp"}}, "attention_backend = 'warp': must be one of flash, fused"),
        ({"megatron_optimizer": {"optimizer": "sgd"}}, "'sgd': must be 'adam' with actor.distributed_optimizer"),
        ({"megatron_optimizer": {"exp_avg_dtype": "int3"}}, "exp_avg_dtype = 'int3': must be one of float32, bfloat16"),
    ],
)
def test_fields_that_cannot_be_set(settings, message):
    with pytest.raises(ValueError, match=message):
        check(architecture_of(random_model("qwen2")), ActorConfig(**settings))


def test_fields_can_be_set_by_name():
    given = {"moe_aux_loss_coeff": 0.01, "attention_backend": "flash", "moe_token_dispatcher_type": "allgather"}
    config = transformer_config(architecture_of(random_model("qwen3 moe")), ActorConfig(transformer=given))
    assert config.moe_aux_loss_coeff == 0.01
    assert config.attention_backend.name == "flash"
    assert config.moe_token_dispatcher_type == "allgather"


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("field", ["bias_activation_fusion", "use_te_activation_func"])
def test_a_given_kind_of_activation_replaces_the_default_one(field, cuda, monkeypatch):
    """Megatron-Core refuses a model with both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    given = {field: True, "transformer_impl": "local"}
    config = transformer_config(architecture_of(random_model("qwen2")), ActorConfig(transformer=given))
    assert config.bias_activation_fusion == (field == "bias_activation_fusion")
    assert config.use_te_activation_func == (field == "use_te_activation_func")


def test_auxiliary_loss_is_off_unless_asked_for():
    assert transformer_config(architecture_of(random_model("qwen3 moe")), ActorConfig()).moe_aux_loss_coeff == 0


def test_real_config_json_is_read(tmp_path):
    """Reads the published config.json of Qwen3-30B-A3B."""
    published = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    read = Architecture.from_directory(tmp_path)
    assert (read.mixture.experts, read.mixture.top_k, read.mixture.ffn) == (128, 8, 768)
    assert read.mixture.layers == (True,) * 48
    assert (read.head_dim, read.kv_groups, read.rope.theta, read.tied) == (128, 4, 1e6, False)
    assert read.padded_vocab(128 * 8) == 152576
