"""Every key of transformers' configuration classes is read, refused, or without effect on the function of the model."""

import inspect

import pytest
import transformers

from fipo_megatron.weights import architecture, config_values
from fipo_megatron.weights.architecture import FAMILIES, Architecture

# Ids of tokens and settings of generation, of initial values, of training, and of windows, which must be off.
WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "output_router_logits", "router_aux_loss_coef", "sliding_window", "max_window_layers"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_transformers_is_known(name):
    cls = getattr(transformers, name.replace("ForCausalLM", "Config"))
    own = {key for key in inspect.get_annotations(cls) if not key.startswith("base_model")}
    source = inspect.getsource(architecture) + inspect.getsource(config_values)
    assert {"hidden_size", "rope_parameters"} <= own
    assert not [key for key in own if key not in WITHOUT_EFFECT and f'"{key}"' not in source]


def test_rope_of_each_kind_of_layer_is_refused():
    config = transformers.Qwen2Config(architectures=["Qwen2ForCausalLM"]).to_dict()
    config["rope_parameters"] = {"full_attention": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ValueError, match=r"rope_parameters\.full_attention = .*: must be one value for all layers"):
        Architecture.from_hf(config)
