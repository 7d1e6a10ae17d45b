"""Translation of our configuration and the model's architecture to Megatron-Core's three configuration classes.

Fields of those classes can be set by name in ``actor.transformer``, ``actor.ddp`` and ``actor.megatron_optimizer``,
unless they follow from the model or from a setting of ours, or change the function of the model
(:mod:`.transformer_fields`). Each value has one source.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, get_type_hints

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from fipo_megatron.actor.transformer_fields import field_problem
from fipo_megatron.config import ActorConfig, Config
from fipo_megatron.weights.architecture import Architecture

_HOPPER = (9, 0)
_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)


_FUNCTION: dict[str, Any] = {
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_query_key_layer_scaling": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "fp16": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
    "moe_shared_expert_intermediate_size": None,
}
"""Fields that change the function of the model. No supported architecture needs another value, and the lr = 0 gate
cannot detect a wrong one, since both passes would agree."""


def transformer_engine_found() -> bool:
    """Returns whether Transformer Engine is installed and a GPU is available."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_used(actor: ActorConfig) -> bool:
    """Returns whether the model is built of Transformer Engine's layers."""
    return transformer_engine_found() and actor.transformer.get("transformer_impl") != "local"


def check(architecture: Architecture, actor: ActorConfig) -> None:
    """Raises ValueError with all reasons why the model cannot be built as configured; builds nothing."""
    problems = architecture.problems(actor) + _fp8_problems(actor)
    for name, cls, derived in (
        ("transformer", TransformerConfig, _derived_transformer(architecture, actor)),
        ("ddp", DistributedDataParallelConfig, _derived_ddp(actor)),
        ("megatron_optimizer", OptimizerConfig, _derived_optimizer(actor)),
    ):
        problems += _field_problems(cls, name, getattr(actor, name), derived)
    problems += _function_problems(actor, _derived_transformer(architecture, actor))
    if architecture.mixture and torch.cuda.is_available() and not transformer_engine_used(actor):
        problems.append(f"{architecture.name}: a mixture of experts on CUDA needs Transformer Engine")
    if architecture.mixture and architecture.mixture.normalised and architecture.mixture.top_k == 1:
        problems.append("config.json: norm_topk_prob = true: with one expert per token its weight has no gradient")
    if actor.distributed_optimizer and (kind := actor.megatron_optimizer.get("optimizer", "adam")) != "adam":
        problems.append(
            f"actor.megatron_optimizer.optimizer = {kind!r}: must be 'adam' with actor.distributed_optimizer"
        )
    wanted = actor.transformer.get("transformer_impl")
    if wanted not in (None, "local") and not transformer_engine_found():
        problems.append(
            f"actor.transformer.transformer_impl = {wanted}: Transformer Engine is not available; valid: local"
        )
    if problems:
        raise ValueError("\n".join(problems))


def check_auxiliary_losses(config: Config) -> None:
    """Raises ValueError if a router's auxiliary loss, scaled by tokens, would be divided by a number of sequences."""
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if config.actor.transformer.get(name) and config.algorithm.aggregation != "token_mean":
            raise ValueError(
                f"actor.transformer.{name} = {config.actor.transformer[name]}: needs algorithm.aggregation = "
                "token_mean; with sequence_mean it would grow with the length of the responses"
            )


def transformer_config(architecture: Architecture, actor: ActorConfig) -> TransformerConfig:
    """Returns Megatron-Core's configuration of the model; ``actor.transformer`` overrides our defaults.

    Raises:
        ValueError: see :func:`check`, or Megatron-Core rejects the configuration.
    """
    check(architecture, actor)
    given = _converted(TransformerConfig, "transformer", actor.transformer)
    return TransformerConfig(
        **(_transformer_defaults(architecture, actor) | given | _derived_transformer(architecture, actor))
    )


def ddp_config(actor: ActorConfig) -> DistributedDataParallelConfig:
    """Returns the configuration of the gradient buffers, reduced in float32 unless ``actor.ddp`` sets another dtype."""
    given = _converted(DistributedDataParallelConfig, "ddp", actor.ddp)
    return DistributedDataParallelConfig(**({"grad_reduce_in_fp32": True} | given | _derived_ddp(actor)))


def optimizer_config(actor: ActorConfig) -> OptimizerConfig:
    """Returns the configuration of the optimizer, AdamW unless ``actor.megatron_optimizer`` sets another one."""
    given = _converted(OptimizerConfig, "megatron_optimizer", actor.megatron_optimizer)
    return OptimizerConfig(**({"optimizer": "adam"} | given | _derived_optimizer(actor)))


def _derived_transformer(architecture: Architecture, actor: ActorConfig) -> dict[str, Any]:
    """Returns the fields that follow from the model and from our own settings."""
    parallel, mixture, fp8 = actor.parallel, architecture.mixture, actor.fp8 != "off"
    dtype = getattr(torch, actor.dtype)
    return {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_groups,
        "kv_channels": architecture.head_dim,
        "ffn_hidden_size": architecture.ffn,
        "softmax_scale": architecture.rope.attention_factor**2 / math.sqrt(architecture.head_dim),
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.family.qkv_bias,
        "qk_layernorm": architecture.family.qk_norm,
        # π_old and π_θ come from two forward passes, which must agree at equal weights.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "num_moe_experts": mixture.experts if mixture else None,
        "moe_ffn_hidden_size": mixture.ffn if mixture else None,
        "moe_router_topk": mixture.top_k if mixture else 2,
        "moe_layer_freq": [int(sparse) for sparse in mixture.layers] if mixture else 1,
        # Softmax over the top k equals softmax over all experts, normalised over the top k.
        "moe_router_pre_softmax": bool(mixture and not mixture.normalised),
        "tensor_model_parallel_size": parallel.tensor_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context_parallel,
        "expert_model_parallel_size": parallel.expert_parallel,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
        "bf16": actor.dtype == "bfloat16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # The loss returns a sum and a count of tokens; Megatron divides by the global count.
        "calculate_per_token_loss": True,
        **_FUNCTION,
        "recompute_granularity": None if actor.recompute == "none" else actor.recompute,
        "fp8": actor.fp8 if fp8 else None,
        "fp8_recipe": actor.fp8_recipe,
        "first_last_layers_bf16": fp8 and actor.fp8_bf16_first_last > 0,
        "num_layers_at_start_in_bf16": actor.fp8_bf16_first_last,
        "num_layers_at_end_in_bf16": actor.fp8_bf16_first_last,
    }


def _transformer_defaults(architecture: Architecture, actor: ActorConfig) -> dict[str, Any]:
    """Returns our defaults where they differ from Megatron-Core's; they can be overridden."""
    parallel, cuda, fused = actor.parallel, torch.cuda.is_available(), transformer_engine_used(actor)
    interleaved = parallel.virtual_pipeline > 1
    defaults: dict[str, Any] = {
        "transformer_impl": "transformer_engine" if fused else "local",
        "use_cpu_initialization": not cuda,
        # On the CPU it works, but compiles for many seconds. Megatron-Core refuses it beside use_te_activation_func.
        "bias_activation_fusion": cuda and not actor.transformer.get("use_te_activation_func", False),
        # A function of the whole output of the first matrix, which Megatron-Core takes from Transformer Engine only:
        # gated_silu.py.
        "use_te_activation_func": not fused and not actor.transformer.get("bias_activation_fusion", cuda),
        # There is no bias and no dropout to fuse, and the fused function is compiled again for every length.
        "bias_dropout_fusion": False,
        "apply_rope_fusion": fused,
        # Micro-batches differ in length, which Megatron forbids with its default dispatcher, also for dense models.
        "variable_seq_lengths": parallel.pipeline_parallel > 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": fused and architecture.mixture is not None,
        # Unfused, tokens return from their experts by atomic additions, whose order on CUDA differs from pass to pass.
        "moe_permute_fusion": fused and cuda and architecture.mixture is not None,
        "moe_router_dtype": "fp32",
        # On gloo, batched transfers of the interleaved schedule return wrong results without an error.
        "batch_p2p_comm": cuda and not interleaved,
        "overlap_p2p_comm": interleaved,
    }
    # The default of either version is deprecated and warns.
    names = {field.name for field in fields(TransformerConfig)}
    defaults["cuda_graph_modules" if "cuda_graph_modules" in names else "cuda_graph_scope"] = []
    if actor.recompute == "selective":
        # Attention keeps little (linear in the tokens); most activation memory is inside the MLPs.
        defaults["recompute_modules"] = ["mlp", "moe"] if architecture.mixture else ["mlp"]
    if actor.recompute == "full":
        defaults |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return defaults


def _derived_ddp(actor: ActorConfig) -> dict[str, Any]:
    return {
        "use_distributed_optimizer": actor.distributed_optimizer,
        "overlap_grad_reduce": actor.overlap_grad_reduce,
        "average_in_collective": False,
        # The log-probs read the output weight without the hook that waits for its gather.
        "overlap_param_gather": False,
        "use_megatron_fsdp": False,
        "num_distributed_optimizer_instances": 1,
    }


def _derived_optimizer(actor: ActorConfig) -> dict[str, Any]:
    own = actor.optimizer
    return {
        "lr": own.lr,
        "min_lr": own.min_lr,
        "weight_decay": own.weight_decay,
        "adam_beta1": own.adam_beta1,
        "adam_beta2": own.adam_beta2,
        "adam_eps": own.adam_eps,
        "clip_grad": own.clip_grad,
        "bf16": actor.dtype == "bfloat16",
        "fp16": False,
        # Gradients would be divided by it, and the loss is not multiplied by it.
        "loss_scale": None,
        "overlap_param_gather": False,
        "params_dtype": getattr(torch, actor.dtype),
        "fp8_recipe": actor.fp8_recipe if actor.fp8 != "off" else None,
        "use_distributed_optimizer": actor.distributed_optimizer,
    }


def _fp8_problems(actor: ActorConfig) -> list[str]:
    if actor.fp8 == "off":
        return []
    if not transformer_engine_found():
        return [f"actor.fp8 = {actor.fp8}: needs CUDA and Transformer Engine, which are not available; valid: off"]
    if (capability := torch.cuda.get_device_capability()) < _HOPPER:
        return [
            f"actor.fp8 = {actor.fp8}: needs Hopper (compute capability 9.0), this GPU has {capability}; valid: off"
        ]
    return []


def _field_problems(cls: type, section: str, given: Mapping[str, Any], derived: Mapping[str, Any]) -> list[str]:
    """Returns problems of fields: unknown to the installed class, derived by us, or with an invalid value."""
    names = [field.name for field in fields(cls)]
    problems = []
    for name, value in given.items():
        where = f"actor.{section}.{name} = {value!r}"
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{where}: Megatron-Core's {cls.__name__} has no such field{hint}")
        elif name in derived:
            problems.append(
                f"{where}: cannot be set here, it follows from the model and the other settings of actor "
                f"({derived[name]!r})"
            )
    try:
        converted = _converted(cls, section, given)
    except ValueError as error:
        return [*problems, str(error)]
    return problems + _type_problems(
        cls, section, {k: v for k, v in converted.items() if k in names and k not in derived}
    )


def _function_problems(actor: ActorConfig, derived: Mapping[str, Any]) -> list[str]:
    """Returns problems of fields that may change the function of the model, without those that hold functions."""
    hints = get_type_hints(TransformerConfig)
    problems = [
        field_problem(name, value)
        for name, value in actor.transformer.items()
        if name in hints and name not in derived and "Callable" not in str(hints[name])
    ]
    return [problem for problem in problems if problem]


def _type_problems(cls: type, section: str, given: Mapping[str, Any]) -> list[str]:
    """Returns problems of values that do not have the annotated type, and of fields that hold functions."""
    hints = get_type_hints(cls)
    problems = []
    for name, value in given.items():
        where = f"actor.{section}.{name} = {value!r}"
        if "Callable" in str(hints[name]):
            problems.append(f"{where}: is a function of Megatron-Core's and cannot be set here")
            continue
        try:
            valid = TypeAdapter(hints[name], config=_ANY_TYPE).validate_python(value)
            if isinstance(value, str) and not isinstance(valid, str):  # Megatron would get the text: 'false' is true
                problems.append(f"{where}: must be {valid!r}, not text")
        except ValidationError as error:
            problems.append(f"{where}: {error.errors()[0]['msg'].replace('Input should be', 'must be')}")
        except PydanticSchemaGenerationError:
            continue  # an annotation that pydantic cannot check
    return problems


def _converted(cls: type, section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts names of dtypes and enum members, as written in YAML, according to the field's default."""
    defaults = {field.name: field.default for field in fields(cls)}
    converted = dict(given)
    for name, value in given.items():
        default = defaults.get(name)
        if isinstance(default, torch.dtype) and isinstance(value, str):
            valid = ["float32", "bfloat16", "float16", "uint8"]
            converted[name] = getattr(torch, value) if value in valid else None
        elif isinstance(default, Enum) and isinstance(value, str):
            valid = list(type(default).__members__)
            converted[name] = type(default).__members__.get(value)
        if converted[name] is None and value is not None:
            raise ValueError(f"actor.{section}.{name} = {value!r}: must be one of {', '.join(valid)}")
    return converted
