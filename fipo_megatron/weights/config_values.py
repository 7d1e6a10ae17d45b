"""Checks the types and ranges of the values in Hugging Face's ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LARGEST_COUNT = 1024
_LARGEST_SIZE = 2**31 - 1
_COUNTS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_MIXTURE_COUNTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_ROPE_NUMBERS = (
    "factor",
    "rope_theta",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "partial_rotary_factor",
)
_BOOLEANS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "mlp_bias", "use_sliding_window")
_OBJECTS = ("rope_parameters", "rope_scaling")


def value_problems(config: Mapping[str, Any], *, mixture: bool) -> list[str]:
    """Lists values of the wrong type or out of range, one line each; a key that is missing or null is valid here.

    Args:
        config: Contents of config.json.
        mixture: Whether the model is a mixture of experts; the keys about experts are not read otherwise.
    """
    problems = [
        *_count_problems(config, _COUNTS + _MIXTURE_COUNTS if mixture else _COUNTS, _LARGEST_COUNT),
        *_count_problems(config, _SIZES, _LARGEST_SIZE),
        *_number_problems(config, _NUMBERS),
    ]
    for key in _BOOLEANS:
        if not isinstance(config.get(key), bool | None):
            problems.append(_problem(key, config[key], "true or false"))
    if not isinstance(config.get("hidden_act"), str | None):
        problems.append(_problem("hidden_act", config["hidden_act"], "text"))
    dense = config.get("mlp_only_layers")
    if not isinstance(dense, list | None) or not all(type(layer) is int for layer in dense or []):
        problems.append(_problem("mlp_only_layers", dense, "a list of numbers of layers"))
    kinds = config.get("layer_types")
    if not isinstance(kinds, list | None) or any(kind != "full_attention" for kind in kinds or []):
        problems.append(_problem("layer_types", kinds, "a list of 'full_attention'"))
    for key in _OBJECTS:
        values = config.get(key)
        if isinstance(values, dict):
            problems += _number_problems(values, _ROPE_NUMBERS, f"{key}.")
            problems += [
                _problem(f"{key}.{name}", value, "one value for all layers")
                for name, value in values.items()
                if isinstance(value, dict)
            ]
            problems += [
                _problem(f"{key}.{name}", values[name], "a number from 0")
                for name in ("mscale", "mscale_all_dim")
                if values.get(name) not in (None, 0) and not _is_positive(values[name])
            ]
            problems += _count_problems(values, ("original_max_position_embeddings",), _LARGEST_SIZE, f"{key}.")
            if not isinstance(values.get("truncate"), bool | None):
                problems.append(_problem(f"{key}.truncate", values["truncate"], "true or false"))
        elif values is not None:
            problems.append(_problem(key, values, "an object"))
    return problems


def head_problems(config: Mapping[str, Any]) -> list[str]:
    """Lists why the heads do not fit each other or the hidden size; the values have the right types."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    problems = []
    if heads % groups:
        problems.append(_problem("num_key_value_heads", groups, f"a divisor of num_attention_heads = {heads}"))
    if config.get("head_dim") is None and hidden % heads:
        problems.append(_problem("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}"))
    elif (width := config.get("head_dim") or hidden // heads) % 2:
        problems.append(_problem("head_dim", width, "even, for the rotary position embedding"))
    experts, top_k = config.get("num_experts") or config.get("num_local_experts"), config.get("num_experts_per_tok")
    if experts and top_k and top_k > experts:
        problems.append(_problem("num_experts_per_tok", top_k, f"at most num_experts = {experts}"))
    return problems


def _count_problems(values: Mapping[str, Any], keys: tuple[str, ...], largest: int, prefix: str = "") -> list[str]:
    return [
        _problem(f"{prefix}{key}", value, f"an integer from 1 to {largest}")
        for key in keys
        if (value := values.get(key)) is not None and (type(value) is not int or not 1 <= value <= largest)
    ]


def _number_problems(values: Mapping[str, Any], keys: tuple[str, ...], prefix: str = "") -> list[str]:
    return [
        _problem(f"{prefix}{key}", value, "a positive number")
        for key in keys
        if (value := values.get(key)) is not None and not _is_positive(value)
    ]


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30 and math.isfinite(value)  # type: ignore[operator,arg-type]  # a number


def _problem(key: str, value: object, valid: str) -> str:
    return f"config.json: {key} = {value!r:.200}: must be {valid}"
