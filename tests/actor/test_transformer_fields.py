"""``actor.transformer`` sets only fields that do not change the function of the model."""

from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest
from megatron.core.transformer import TransformerConfig

from fipo_megatron.actor import megatron_config
from fipo_megatron.actor.megatron_config import check, optimizer_config
from fipo_megatron.actor.transformer_fields import FREE, REFUSED
from fipo_megatron.config import ActorConfig
from fipo_megatron.weights.architecture import Architecture
from tests.actor.models import random_model

FIELDS = [field.name for field in fields(TransformerConfig)]


@pytest.fixture(scope="module")
def architecture():
    return Architecture.from_hf(random_model("qwen3 moe").config.to_dict())


def error_of(architecture, **fields):
    with pytest.raises(ValueError, match=r"actor\.transformer") as error:
        check(architecture, ActorConfig(transformer=fields))
    return str(error.value)


def test_every_field_of_the_installed_version_is_classified(architecture):
    derived = set(megatron_config._derived_transformer(architecture, ActorConfig()))
    functions = {name for name, hint in get_type_hints(TransformerConfig).items() if "Callable" in str(hint)}
    classes = (FREE, REFUSED, derived, functions - derived)
    assert {name: sum(name in names for names in classes) for name in FIELDS} == dict.fromkeys(FIELDS, 1)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in FREE])
def test_all_other_fields_are_refused(name, architecture):
    """Sets each field to its own default: a field cannot be set, whatever its value."""
    [default] = [field.default for field in fields(TransformerConfig) if field.name == name]
    assert f"actor.transformer.{name} = " in error_of(architecture, **{name: default})


def test_fields_of_a_later_version_are_refused(architecture, monkeypatch):
    @dataclass
    class Later(TransformerConfig):
        logits_multiplier: float = 1.0

    monkeypatch.setattr(megatron_config, "TransformerConfig", Later)
    message = "actor.transformer.logits_multiplier = 2.0: cannot be set here; config.json defines the function"
    assert message in error_of(architecture, logits_multiplier=2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"activation_func_clamp_value": 7.0},
            "activation_func_clamp_value = 7.0: cannot be set here; config.json",
        ),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset = 1.0: cannot be set here; config.json"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "moe_router_load_balancing_type = 'sinkhorn': must be one of aux_loss, global_aux_loss, none",
        ),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss"},
            "'seq_aux_loss': must be one of aux_loss, global_aux_loss",
        ),
        ({"moe_router_load_balancing_type": ["aux_loss"]}, "['aux_loss']: must be one of aux_loss, global_aux_loss"),
        ({"moe_aux_loss_coeff": [0.1]}, "moe_aux_loss_coeff = [0.1]: must be one number from 0"),
        ({"moe_z_loss_coeff": -1.0}, "moe_z_loss_coeff = -1.0: must be one number from 0"),
        (
            {"transformer_impl": "inference_optimized"},
            "'inference_optimized': must be one of local, transformer_engine",
        ),
    ],
)
def test_what_changes_the_function_is_refused_by_name(given, message, architecture):
    assert message in error_of(architecture, **given)


def test_a_loss_scale_cannot_be_set():
    """Megatron would divide the gradients by it."""
    assert optimizer_config(ActorConfig()).loss_scale is None
    with pytest.raises(ValueError, match=r"actor\.megatron_optimizer\.loss_scale = 1024: cannot be set here"):
        check(
            Architecture.from_hf(random_model("qwen2").config.to_dict()),
            ActorConfig(megatron_optimizer={"loss_scale": 1024}),
        )
