"""The architecture of a model from Hugging Face's ``config.json``, and the layouts that it can be sharded over.

Needs neither Megatron nor transformers. All problems of a model or its layout are found here, before anything is built,
and reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.config import ActorConfig
from fipo_megatron.storage.json_files import read_json_object
from fipo_megatron.weights.config_values import head_problems, value_problems

_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)

_UNSUPPORTED = ("quantization_config", "dual_chunk_attention_config")
"""Keys that must be false or absent for every family: they change what the weights mean, or what an engine computes."""


@dataclass(frozen=True)
class Family:
    """Properties implied by an entry of ``architectures`` in config.json.

    Attributes:
        qkv_bias: The query, key and value projections have a bias.
        qk_norm: Queries and keys are normalised per head.
        mixture: Layers are mixtures of experts.
        required: Keys of config.json beyond those of every family.
        unsupported: Keys that must be false or absent; they change the model in unsupported ways.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    mixture: bool = False
    required: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(unsupported=("attention_bias", "mlp_bias")),
    "Qwen2ForCausalLM": Family(qkv_bias=True, required=("num_key_value_heads",), unsupported=("use_sliding_window",)),
    "Qwen3ForCausalLM": Family(
        qk_norm=True,
        required=("num_key_value_heads", "head_dim"),
        unsupported=("attention_bias", "use_sliding_window"),
    ),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True,
        mixture=True,
        required=("num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size"),
        unsupported=("attention_bias", "use_sliding_window"),
    ),
}
"""The architectures that can be trained, by their name in config.json."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        kind: ``default``, ``linear``, ``llama3`` or ``yarn``.
        theta: Base of the wavelengths.
        factor: Factor of the context extension.
        original_positions: Context length before the extension, in tokens.
        low_frequency_factor: llama3: wavelengths beyond ``original_positions`` over this are stretched.
        high_frequency_factor: llama3: wavelengths below ``original_positions`` over this are kept.
        beta_fast: YaRN: dimensions with more rotations over the original context are kept.
        beta_slow: YaRN: dimensions with fewer rotations are stretched.
        truncate: YaRN: round those bounds to whole dimensions.
        attention_factor: Factor on queries and keys.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        experts: Number of experts per layer.
        top_k: Number of experts per token.
        ffn: Inner width of an expert.
        normalised: The weights of a token's experts sum to 1.
        layers: True for each layer that is a mixture.
    """

    experts: int
    top_k: int
    ffn: int
    normalised: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder.

    Attributes:
        name: Entry in ``architectures`` of config.json.
        family: Properties implied by the name.
        hidden: Width of the residual stream.
        layers: Number of layers.
        heads: Query heads.
        kv_groups: Key and value heads.
        head_dim: Width of a head.
        ffn: Inner width of a dense MLP.
        vocab: Size of the vocabulary, without padding.
        norm_epsilon: Epsilon of every RMSNorm.
        tied: The output weight is the embedding.
        max_positions: Context length declared by config.json, in tokens.
        rope: Rotary position embedding.
        mixture: Mixture of experts; None for a dense model.
    """

    name: str
    family: Family
    hidden: int
    layers: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    vocab: int
    norm_epsilon: float
    tied: bool
    max_positions: int
    rope: Rope
    mixture: Mixture | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads the contents of config.json as written by transformers 4 or 5.

        Raises:
            ValueError: the architecture is unknown, keys are missing, or settings are not supported; one line each.
        """
        names = config.get("architectures") or [None]
        if not isinstance(names, list) or names[0] not in [*FAMILIES]:
            raise ValueError(f"config.json: architectures = {names!r:.200}: supported are {', '.join(FAMILIES)}")
        family = FAMILIES[names[0]]
        if problems := value_problems(config, mixture=family.mixture) or _unreadable(config, family):
            raise ValueError("\n".join(problems))
        heads = config["num_attention_heads"]
        return cls(
            name=names[0],
            family=family,
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            norm_epsilon=config["rms_norm_eps"],
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config["max_position_embeddings"],
            rope=_read_rope(config),
            mixture=_read_mixture(config) if family.mixture else None,
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> Architecture:
        """Reads ``config.json`` of a Hugging Face directory.

        Raises:
            ValueError: see :meth:`from_hf`, or the file cannot be read as a JSON object.
            FileNotFoundError: the file does not exist.
        """
        return cls.from_hf(read_json_object(Path(path) / "config.json"))

    def padded_vocab(self, multiple: int) -> int:
        """Returns the number of rows of the embedding: the vocabulary rounded up to a multiple."""
        return -(-self.vocab // multiple) * multiple

    def problems(self, actor: ActorConfig) -> list[str]:
        """Returns why the model cannot be sharded as configured: field, value and valid values, one line each."""
        parallel, found = actor.parallel, []
        tensor = parallel.tensor_parallel
        for what, size in (("attention heads", self.heads), ("KV heads", self.kv_groups), ("FFN width", self.ffn)):
            if size % tensor:
                found.append(
                    f"actor.parallel.tensor_parallel = {tensor}: must divide the model's {what}, {size}; "
                    f"valid: {_divisors(math.gcd(self.heads, self.kv_groups, self.ffn))}"
                )
        stages = parallel.pipeline_parallel * parallel.virtual_pipeline
        if self.layers % stages and not _UNEVEN & actor.transformer.keys():
            found.append(
                f"actor.parallel.pipeline_parallel = {parallel.pipeline_parallel}, virtual_pipeline = "
                f"{parallel.virtual_pipeline}: their product must divide the model's {self.layers} layers; "
                f"valid: {_divisors(self.layers)}"
            )
        return found + self._expert_problems(actor)

    def _expert_problems(self, actor: ActorConfig) -> list[str]:
        parallel, found = actor.parallel, []
        given = {"expert_parallel": parallel.expert_parallel, "expert_tensor_parallel": parallel.expert_tensor_size}
        if self.mixture is None:
            if parallel.expert_parallel > 1 or (parallel.expert_tensor_parallel or 1) > 1:
                named = ", ".join(f"{name} = {size}" for name, size in given.items())
                found.append(f"actor.parallel: {named}: must not be set, {self.name} is a dense model")
            return found
        for name, what, size in (
            ("expert_parallel", "experts", self.mixture.experts),
            ("expert_tensor_parallel", "FFN width of an expert", self.mixture.ffn),
        ):
            if size % given[name]:
                found.append(
                    f"actor.parallel.{name} = {given[name]}: must divide the model's {what}, {size}; "
                    f"valid: {_divisors(size)}"
                )
        if parallel.expert_parallel == 1 and parallel.expert_tensor_size != parallel.tensor_parallel:
            # Megatron-Core reduces experts' gradients over their own groups only where expert_parallel > 1
            # (tensor_parallel/layers.py:829); their copies on the tensor-parallel ranks would drift apart.
            found.append(
                f"actor.parallel.expert_tensor_parallel = {parallel.expert_tensor_size}: must be tensor_parallel = "
                f"{parallel.tensor_parallel} while expert_parallel = 1"
            )
        if parallel.tensor_parallel > 1 and not parallel.sequence_parallel:
            found.append(
                "actor.parallel.sequence_parallel = False: must be true for a mixture of experts with "
                f"tensor_parallel = {parallel.tensor_parallel}; its router sees every token once only then"
            )
        return found


_UNEVEN = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
}
"""Fields of TransformerConfig that split layers unevenly; Megatron-Core checks such splits itself."""


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _unreadable(config: Mapping[str, Any], family: Family) -> list[str]:
    """Returns problems of keys that are missing or have unsupported values."""
    problems = [f"config.json: {key}: missing" for key in (*_REQUIRED, *family.required) if config.get(key) is None]
    if problems:
        return problems
    problems = head_problems(config)
    problems += [
        f"config.json: {key} = {config[key]!r:.200}: not supported"
        for key in (*family.unsupported, *_UNSUPPORTED)
        if config.get(key)
    ]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act = {config['hidden_act']!r}: must be 'silu'")
    if family.mixture and config.get("num_experts", config.get("num_local_experts")) is None:
        problems.append("config.json: num_experts: missing")
    values = _rope_values(config)
    if (kind := _rope_kind(values)) not in _ROPE_KEYS:
        problems.append(f"config.json: rope type {kind!r}: supported are {', '.join(_ROPE_KEYS)}")
    else:
        problems += [
            f"config.json: {key} of rope type {kind!r}: missing" for key in _ROPE_KEYS[kind] if values.get(key) is None
        ]
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("config.json: partial_rotary_factor: must be 1")
    return problems


_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def _rope_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns ``rope_parameters`` of transformers 5, or ``rope_scaling`` of transformers 4."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_kind(values: Mapping[str, Any]) -> str:
    return str(values.get("rope_type") or values.get("type") or "default")


def _read_rope(config: Mapping[str, Any]) -> Rope:
    """Reads the settings like transformers' ``modeling_rope_utils``, with the same defaults."""
    values = _rope_values(config)
    kind = _rope_kind(values)
    factor = float(values.get("factor") or 1.0)
    return Rope(
        kind=kind,
        theta=float(values.get("rope_theta") or config.get("rope_theta") or 10000.0),
        factor=factor,
        original_positions=values.get("original_max_position_embeddings") or config["max_position_embeddings"],
        low_frequency_factor=values.get("low_freq_factor") or 1.0,
        high_frequency_factor=values.get("high_freq_factor") or 1.0,
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        truncate=values.get("truncate", True),
        attention_factor=_yarn_attention_factor(values, factor) if kind == "yarn" else 1.0,
    )


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """Returns the root of YaRN's temperature (arXiv 2309.00071, Eq. 22): 0.1 ln(factor) + 1, or as configured."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return temperature(values["mscale"]) / temperature(values["mscale_all_dim"])
    return temperature(1.0)


def _read_mixture(config: Mapping[str, Any]) -> Mixture:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return Mixture(
        experts=config["num_experts"] if config.get("num_experts") is not None else config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        ffn=config["moe_intermediate_size"],
        normalised=bool(config.get("norm_topk_prob", False)),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"])),
    )
