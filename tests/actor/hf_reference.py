"""Weights of a transformers model in Megatron's layout: an independent implementation for tests.

``full_tensors`` gives every tensor whole, under Megatron's name, with the layer's and the expert's number in the whole
model; ``shard`` cuts one for a rank. Together they say what any rank must hold, of weights or of gradients.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fipo_megatron.actor.model import HiddenStateGPTModel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.weights.architecture import Architecture


def full_tensors(hf: Mapping[str, Tensor], architecture: Architecture, padded_vocab: int) -> dict[str, Tensor]:
    """Returns all Megatron tensors, whole, from a transformers model's ``state_dict()`` or gradients by its names."""

    def pad(weight_VH: Tensor) -> Tensor:
        return torch.nn.functional.pad(weight_VH, (0, 0, 0, padded_vocab - len(weight_VH)))

    full = {
        "embedding.word_embeddings.weight": pad(hf["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": pad(hf["model.embed_tokens.weight" if architecture.tied else "lm_head.weight"]),
    }
    for number in range(architecture.layers):
        layer = {
            name.removeprefix(f"model.layers.{number}."): tensor
            for name, tensor in hf.items()
            if name.startswith(f"model.layers.{number}.")
        }
        full |= {f"decoder.layers.{number}.{name}": tensor for name, tensor in _layer(layer, architecture).items()}
    return full


def _layer(hf: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    layer = {
        "input_layernorm.weight": hf["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": hf["post_attention_layernorm.weight"],
        "self_attention.linear_qkv.weight": _qkv(hf, architecture, "weight"),
        "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"],
    }
    if "self_attn.q_proj.bias" in hf:
        layer["self_attention.linear_qkv.bias"] = _qkv(hf, architecture, "bias")
    if "self_attn.q_norm.weight" in hf:
        layer["self_attention.q_layernorm.weight"] = hf["self_attn.q_norm.weight"]
        layer["self_attention.k_layernorm.weight"] = hf["self_attn.k_norm.weight"]
    if "mlp.gate.weight" not in hf:
        gate_up = torch.cat([hf["mlp.gate_proj.weight"], hf["mlp.up_proj.weight"]])
        return layer | {"mlp.linear_fc1.weight": gate_up, "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"]}
    layer["mlp.router.weight"] = hf["mlp.gate.weight"]
    experts = zip(hf["mlp.experts.gate_up_proj"], hf["mlp.experts.down_proj"], strict=True)
    for number, (gate_up, down) in enumerate(experts):
        layer[f"mlp.experts.local_experts.{number}.linear_fc1.weight"] = gate_up
        layer[f"mlp.experts.local_experts.{number}.linear_fc2.weight"] = down
    return layer


def _qkv(hf: Mapping[str, Tensor], architecture: Architecture, kind: str) -> Tensor:
    """Concatenates query, key and value by KV group."""
    groups = architecture.kv_groups
    q, k, v = (hf[f"self_attn.{name}_proj.{kind}"].chunk(groups) for name in "qkv")
    return torch.cat([part for group in zip(q, k, v, strict=True) for part in group])


def shard(name: str, full: Tensor, layout: RankLayout) -> Tensor:
    """Returns a rank's shard of a whole tensor."""
    rank, size = layout.tensor_rank, layout.tensor_size
    if "local_experts" in name:
        rank, size = layout.expert_tensor_rank, layout.expert_tensor_size
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if "linear_qkv" in name or "word_embeddings" in name or "output_layer" in name:
        return full.chunk(size)[rank]
    if "linear_proj" in name or "linear_fc2" in name:
        return full.chunk(size, dim=1)[rank]
    return full


def named_parameters(
    chunk: HiddenStateGPTModel, architecture: Architecture, layout: RankLayout
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields a chunk's parameters under the names of ``full_tensors``."""
    first_expert = (
        layout.expert_rank * (architecture.mixture.experts // layout.expert_size) if architecture.mixture else 0
    )
    for name, parameter in chunk.named_parameters():
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            number = chunk.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}.{name[match.end() :]}"
        if match := re.search(r"local_experts\.(\d+)", name):
            name = name.replace(match[0], f"local_experts.{first_expert + int(match[1])}")
        yield name, parameter


def load(chunk: HiddenStateGPTModel, hf: Mapping[str, Tensor], architecture: Architecture, layout: RankLayout) -> None:
    """Fills a chunk's parameters from a transformers model's ``state_dict()``."""
    full = full_tensors(hf, architecture, chunk.vocab_size)
    with torch.no_grad():
        for name, parameter in named_parameters(chunk, architecture, layout):
            parameter.copy_(shard(name, full[name], layout))
