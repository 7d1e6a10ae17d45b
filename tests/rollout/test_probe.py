"""The probe's bounds: rounding and rare tokens pass, a bucket of weights that is wrong does not."""

import copy

import numpy as np
import pytest
import torch
import transformers

from fipo_megatron.config import ServersConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.weight_sync.probe import RESPONSES, check_probe

VOCAB, TOKENS = 64, 32
BOUNDS = {"max_mean": ServersConfig().max_probe_mean_shift, "max_quantile": ServersConfig().max_probe_quantile_shift}


@pytest.fixture(scope="module")
def model():
    """A model whose next token has an entropy of about a nat, as that of a trained model has."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = transformers.Qwen3ForCausalLM(config).eval()
        for name, parameter in found.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "lm_head" in name else parameter.shape[1] ** -0.5)
    return found


@torch.no_grad()
def log_probs(model, ids):
    """Returns ``[responses, tokens]`` log-probs of the sampled tokens."""
    return torch.log_softmax(model(ids).logits.float(), -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def sampled(model):
    """``[responses, 1 + tokens]`` ids that the model has sampled."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.arange(RESPONSES)[:, None] * 7 % VOCAB
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, torch.softmax(model(ids).logits[:, -1], -1).multinomial(1, generator=generator)], 1)
    return ids


def differences(model, engine, ids):
    return (log_probs(engine, ids) - log_probs(model, ids)).abs().flatten().double().numpy()


def test_an_engine_that_rounds_to_bfloat16_passes(model, sampled):
    shift = check_probe(differences(model, copy.deepcopy(model).bfloat16(), sampled), 1, **BOUNDS)
    assert shift.tokens == RESPONSES * TOKENS
    assert 1e-3 < shift.mean < shift.quantile < shift.largest


def test_rare_tokens_pass_and_are_reported(model, sampled):
    """Twelve of 256 tokens differ by more than a nat: rare tokens have the largest logits to round."""
    found = differences(model, copy.deepcopy(model).bfloat16(), sampled)
    found[::22] += 1.25
    shift = check_probe(found, 1, **BOUNDS)
    assert shift.largest > 1.25


def rolled_rows(name):
    return lambda weights: weights[name].copy_(weights[name].roll(1, 0))


def scaled(name, factor):
    return lambda weights: weights[name].mul_(factor)


def one_layer_of_another_version(weights):
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if name.startswith("model.layers.2.") and tensor.ndim == 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.std())


def one_bucket_of_zeros(weights):
    weights["model.layers.1.mlp.up_proj.weight"].zero_()


def part_of_an_embedding(weights):
    weights["model.embed_tokens.weight"][: VOCAB // 4] = 0.0


CORRUPTIONS = {
    "rows of the embedding are shifted": rolled_rows("model.embed_tokens.weight"),
    "a quarter of the embedding is missing": part_of_an_embedding,
    "rows of the output layer are shifted": rolled_rows("lm_head.weight"),
    "rows of a matrix are shifted": rolled_rows("model.layers.1.mlp.down_proj.weight"),
    "a layer is of another version": one_layer_of_another_version,
    "a matrix is doubled": scaled("model.layers.3.mlp.down_proj.weight", 2.0),
    "a matrix is halved": scaled("model.layers.0.self_attn.o_proj.weight", 0.5),
    "the output layer is scaled": scaled("lm_head.weight", 1.25),
    "a norm is scaled": scaled("model.norm.weight", 0.75),
    "a matrix is zero": one_bucket_of_zeros,
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupted_weights_are_noticed(corruption, model, sampled):
    engine = copy.deepcopy(model)
    with torch.no_grad():
        CORRUPTIONS[corruption](engine.state_dict())
    found = differences(model, engine.bfloat16(), sampled)
    with pytest.raises(EngineError, match=r"after the update to version 7, .* it does not serve these weights"):
        check_probe(found, 7, **BOUNDS)


def test_a_number_that_is_none_is_noticed():
    differences = np.zeros(256)
    differences[3] = np.nan
    with pytest.raises(EngineError, match="differ from the actor's by inf in the mean"):
        check_probe(differences, 1, **BOUNDS)
