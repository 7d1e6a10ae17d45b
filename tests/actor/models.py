"""Tiny random transformers models of every architecture, and one forward pass of Megatron's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from fipo_megatron.actor.model import HiddenStateGPTModel

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MIXTURE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"rope_theta": 1e6, "beta_fast": 16}}),
    "qwen3 yarn, factor given": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen3 yarn, untruncated": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"truncate": False}}),
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3 tied": ("Llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen3 moe": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True}),
    "qwen3 moe, not normalised": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": False}),
    "qwen3 moe, some dense": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3 moe, every second": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
}
"""Architecture in transformers and differences from ``SHAPE``."""


def random_model(name: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Returns a model of ``MODELS`` in float32, with random norms and biases."""
    family, special = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **special, **changes})
    config.architectures = [f"{family}ForCausalLM"]
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, spread = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.15)
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))
    return model


def packed(lengths: Sequence[int], padded: Sequence[int]) -> PackedSeqParams:
    """Returns sequences of these lengths, padded to those."""
    cu, cu_padded = (torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)) for sizes in (lengths, padded))
    return PackedSeqParams("thd", cu, cu, cu_padded, cu_padded, max(padded), max(padded))


def logits(model: HiddenStateGPTModel, sequences: Sequence[Tensor], padding: int = 0) -> list[Tensor]:
    """Returns logits ``[L, vocabulary]`` of each sequence ``[L]``, packed into one forward pass of a whole model."""
    lengths = [len(sequence) for sequence in sequences]
    padded = [length + padding for length in lengths]
    ids_T = torch.cat([torch.nn.functional.pad(sequence, (0, padding)) for sequence in sequences])
    positions_T = torch.cat([torch.arange(length) for length in padded])
    hidden_T1H = model(ids_T[None], positions_T[None], None, packed_seq_params=packed(lengths, padded))
    logits_TV = hidden_T1H[:, 0] @ model.output_weight().T
    parts = zip(logits_TV.split(padded), lengths, strict=True)
    return [part[:length, : model.true_vocab_size] for part, length in parts]
