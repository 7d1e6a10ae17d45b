"""One table per architecture: the Hugging Face tensors that make up each Megatron parameter.

Everything about weights follows from :data:`TABLES`: the tensors on disk (:func:`hf_tensors`), the parameters of any
rank with their shapes and slices of tensors (:func:`local_weights`), the problems of a set of tensors (:func:`check`),
and parameter counts. Loading copies slices into parameters, exporting copies them back.

A parameter interleaves its tensors block by block. With two blocks, the rows of

    gate [4, H], up [4, H]      are     gate 0:2, up 0:2, gate 2:4, up 2:4

and every tensor-parallel rank holds the same number of consecutive blocks. Queries, keys and values have one block per
KV group (``SelfAttention.get_query_key_value_tensors`` of ``megatron/core/transformer/attention.py``). All other
parameters have one block per rank, since the gated MLP of each rank splits its own rows in half (``mlp.py``).

On disk, mixtures have one tensor per expert, although transformers 5 fuses them in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.placement import PLAIN, Chunk, Naming, ParameterPlacement, Piece

Shape = tuple[int, ...]
Where = Literal["first", "last", "layer", "dense", "mixture"]


@dataclass(frozen=True)
class Entry:
    """One entry of a table: tensors on disk and the parameter that they make up.

    Attributes:
        tensors: Name and dimensions of each tensor; :func:`_sizes` defines the names of dimensions.
        parameter: Name with Megatron-Core's own layers and one module per expert
            (``get_gpt_layer_local_spec`` of ``megatron/core/models/gpt/gpt_layer_specs.py``).
        where: The first chunk (embedding), the last (output), every layer, or the layers that are dense or mixtures.
        axis: Axis along which tensor parallelism shards the parameter; None: replicated.
        by_group: Blocks are KV groups.
        padded: Rows are padded with zeros to the padded vocabulary.
        tied: Name of the tensor that replaces ``tensors`` in a tied model.
        fused: Name with Transformer Engine if it differs
            (``get_gpt_layer_with_transformer_engine_spec``): norms are part of the matrix that follows.
        grouped: Name if one module holds all experts (``TEGroupedMLP`` of ``transformer/moe/experts.py``).
    """

    tensors: tuple[tuple[str, tuple[str, ...]], ...]
    parameter: str
    where: Where = "layer"
    axis: int | None = None
    by_group: bool = False
    padded: bool = False
    tied: str | None = None
    fused: str | None = None
    grouped: str | None = None


_HF, _MEGATRON = "model.layers.{layer}.", "decoder.layers.{layer}."
_EXPERT_HF, _EXPERT = f"{_HF}mlp.experts.{{expert}}.", f"{_MEGATRON}mlp.experts.local_experts.{{expert}}."
_EMBEDDING = Entry(
    (("model.embed_tokens.weight", ("vocab", "hidden")),),
    "embedding.word_embeddings.weight",
    where="first",
    axis=0,
    padded=True,
)
_QKV = Entry(
    (
        (f"{_HF}self_attn.q_proj.weight", ("query", "hidden")),
        (f"{_HF}self_attn.k_proj.weight", ("kv", "hidden")),
        (f"{_HF}self_attn.v_proj.weight", ("kv", "hidden")),
    ),
    f"{_MEGATRON}self_attention.linear_qkv.weight",
    axis=0,
    by_group=True,
)
_QKV_BIAS = Entry(
    (
        (f"{_HF}self_attn.q_proj.bias", ("query",)),
        (f"{_HF}self_attn.k_proj.bias", ("kv",)),
        (f"{_HF}self_attn.v_proj.bias", ("kv",)),
    ),
    f"{_MEGATRON}self_attention.linear_qkv.bias",
    axis=0,
    by_group=True,
)
_OUTPUT_PROJECTION = Entry(
    ((f"{_HF}self_attn.o_proj.weight", ("hidden", "query")),), f"{_MEGATRON}self_attention.linear_proj.weight", axis=1
)
_QK_NORM = (
    Entry(((f"{_HF}self_attn.q_norm.weight", ("head",)),), f"{_MEGATRON}self_attention.q_layernorm.weight"),
    Entry(((f"{_HF}self_attn.k_norm.weight", ("head",)),), f"{_MEGATRON}self_attention.k_layernorm.weight"),
)
_INPUT_NORM = Entry(
    ((f"{_HF}input_layernorm.weight", ("hidden",)),),
    f"{_MEGATRON}input_layernorm.weight",
    fused=f"{_MEGATRON}self_attention.linear_qkv.layer_norm_weight",
)
_DENSE = (
    Entry(
        (
            (f"{_HF}mlp.gate_proj.weight", ("ffn", "hidden")),
            (f"{_HF}mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        f"{_MEGATRON}mlp.linear_fc1.weight",
        where="dense",
        axis=0,
    ),
    Entry(
        ((f"{_HF}mlp.down_proj.weight", ("hidden", "ffn")),),
        f"{_MEGATRON}mlp.linear_fc2.weight",
        where="dense",
        axis=1,
    ),
    Entry(
        ((f"{_HF}post_attention_layernorm.weight", ("hidden",)),),
        f"{_MEGATRON}pre_mlp_layernorm.weight",
        where="dense",
        fused=f"{_MEGATRON}mlp.linear_fc1.layer_norm_weight",
    ),
)
_MIXTURE = (
    Entry(
        ((f"{_HF}mlp.gate.weight", ("experts", "hidden")),),
        f"{_MEGATRON}mlp.router.weight",
        where="mixture",
    ),
    Entry(
        (
            (f"{_EXPERT_HF}gate_proj.weight", ("expert_ffn", "hidden")),
            (f"{_EXPERT_HF}up_proj.weight", ("expert_ffn", "hidden")),
        ),
        f"{_EXPERT}linear_fc1.weight",
        where="mixture",
        axis=0,
        grouped=f"{_MEGATRON}mlp.experts.linear_fc1.weight{{expert}}",
    ),
    Entry(
        ((f"{_EXPERT_HF}down_proj.weight", ("hidden", "expert_ffn")),),
        f"{_EXPERT}linear_fc2.weight",
        where="mixture",
        axis=1,
        grouped=f"{_MEGATRON}mlp.experts.linear_fc2.weight{{expert}}",
    ),
    Entry(
        ((f"{_HF}post_attention_layernorm.weight", ("hidden",)),),
        f"{_MEGATRON}pre_mlp_layernorm.weight",
        where="mixture",
    ),
)
_FINAL = (
    Entry((("model.norm.weight", ("hidden",)),), "decoder.final_layernorm.weight", where="last"),
    Entry(
        (("lm_head.weight", ("vocab", "hidden")),),
        "output_layer.weight",
        where="last",
        axis=0,
        padded=True,
        tied="model.embed_tokens.weight",
    ),
)

TABLES: Mapping[str, tuple[Entry, ...]] = {
    "LlamaForCausalLM": (_EMBEDDING, _QKV, _OUTPUT_PROJECTION, *_DENSE, _INPUT_NORM, *_FINAL),
    "Qwen2ForCausalLM": (_EMBEDDING, _QKV, _QKV_BIAS, _OUTPUT_PROJECTION, *_DENSE, _INPUT_NORM, *_FINAL),
    "Qwen3ForCausalLM": (_EMBEDDING, _QKV, _OUTPUT_PROJECTION, *_QK_NORM, *_DENSE, _INPUT_NORM, *_FINAL),
    "Qwen3MoeForCausalLM": (
        _EMBEDDING,
        _QKV,
        _OUTPUT_PROJECTION,
        *_QK_NORM,
        *_DENSE,
        *_MIXTURE,
        _INPUT_NORM,
        *_FINAL,
    ),
}
"""Tables by the entry of ``architectures`` in config.json."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers on disk in old checkpoints of Llama 2 that are not weights."""


@dataclass(frozen=True)
class Weight:
    """A whole Megatron parameter and the tensors it consists of.

    Attributes:
        entry: Entry of the table.
        tensors: Name and shape of each tensor on disk.
        blocks: Number of KV groups if they are the blocks; None: one block per rank.
        layer: Index of the layer in the whole model; None: not part of a layer.
        expert: Index of the expert in the layer; None: not part of an expert.
        copy: The parameter is the second copy, in a tied model, of one that another chunk holds.
    """

    entry: Entry
    tensors: tuple[tuple[str, Shape], ...]
    blocks: int | None = None
    layer: int | None = None
    expert: int | None = None
    copy: bool = False

    def name(self, naming: Naming = PLAIN, layer: int | None = None, expert: int | None = None) -> str:
        """Returns the parameter's name; ``layer`` and ``expert`` override the indices in the whole model."""
        pattern = self.entry.parameter
        if naming.fused_norms and self.entry.fused:
            pattern = self.entry.fused
        if naming.grouped_experts and self.entry.grouped:
            pattern = self.entry.grouped
        return pattern.format(
            layer=self.layer if layer is None else layer, expert=self.expert if expert is None else expert
        )

    @cached_property
    def elements(self) -> int:
        """Number of elements without padding."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def shard(self, placement: ParameterPlacement) -> tuple[int, int]:
        """Returns index and number of shards for a rank, provided that it holds one."""
        if self.entry.axis is None:
            return 0, 1
        if self.expert is not None:
            return placement.expert_tensor_rank, placement.expert_tensor_size
        return placement.tensor_rank, placement.tensor_size

    def shape(self, padded_vocab: int, size: int = 1) -> Shape:
        """Returns the shape of one shard of ``size``.

        Raises:
            ValueError: the parameter cannot be divided into ``size`` shards.
        """
        axis, first = self.entry.axis, self.tensors[0][1]
        if axis is None:
            return first
        whole = padded_vocab if self.entry.padded else sum(shape[axis] for _, shape in self.tensors)
        blocks = self.blocks or size
        if blocks % size or whole % blocks or any(shape[axis] % blocks for _, shape in self._unpadded_tensors()):
            raise ValueError(
                f"{self.name()}: {whole} along axis {axis}, in {blocks} blocks, cannot be divided into {size} shards"
            )
        return (*first[:axis], whole // size, *first[axis + 1 :])

    def _unpadded_tensors(self) -> tuple[tuple[str, Shape], ...]:
        return () if self.entry.padded else self.tensors

    def pieces(self, part: int, size: int, padded_vocab: int) -> Iterator[Piece]:
        """Yields the pieces of shard ``part`` of ``size``; rows that no piece covers are padding.

        Raises:
            ValueError: see :meth:`shape`.
        """
        self.shape(padded_vocab, size)
        axis = self.entry.axis or 0
        if size == 1 and len(self.tensors) == 1:
            (name, shape), *_ = self.tensors
            yield Piece(name, axis, 0, shape[axis], 0)
            return
        blocks, offset = self.blocks or size, 0
        for block in range(part * blocks // size, (part + 1) * blocks // size):
            for name, shape in self.tensors:
                width = (padded_vocab if self.entry.padded else shape[axis]) // blocks
                start, stop = block * width, min((block + 1) * width, shape[axis])
                if stop > start:
                    yield Piece(name, axis, start, stop, offset)
                offset += width


@dataclass(frozen=True)
class LocalWeight:
    """A parameter, or a shard of one, on a rank.

    Attributes:
        weight: The whole parameter.
        chunk: Index in ``ParameterPlacement.chunks``.
        name: Name in that chunk, with the local indices of layer and expert.
        shape: Shape of the shard.
    """

    weight: Weight
    chunk: int
    name: str
    shape: Shape


def _sizes(architecture: Architecture) -> dict[str, int]:
    """Returns the sizes of the dimensions named in the tables."""
    mixture = architecture.mixture
    return {
        "hidden": architecture.hidden,
        "vocab": architecture.vocab,
        "query": architecture.heads * architecture.head_dim,
        "kv": architecture.kv_groups * architecture.head_dim,
        "head": architecture.head_dim,
        "ffn": architecture.ffn,
        "experts": mixture.experts if mixture else 0,
        "expert_ffn": mixture.ffn if mixture else 0,
    }


def _entries(architecture: Architecture, where: Sequence[Where]) -> list[Entry]:
    return [entry for entry in TABLES[architecture.name] if entry.where in where]


def _weight(architecture: Architecture, entry: Entry, layer: int | None, expert: int | None = None) -> Weight:
    sizes, copy = _sizes(architecture), bool(architecture.tied and entry.tied)
    tensors = tuple(
        (
            (entry.tied if copy and entry.tied else name).format(layer=layer, expert=expert),
            tuple(sizes[dimension] for dimension in dimensions),
        )
        for name, dimensions in entry.tensors
    )
    return Weight(entry, tensors, architecture.kv_groups if entry.by_group else None, layer, expert, copy)


def expert_weight(architecture: Architecture, weight: Weight, expert: int) -> Weight:
    """Returns the same parameter of another expert of the layer."""
    return _weight(architecture, weight.entry, weight.layer, expert)


def _layer_weights(architecture: Architecture, layer: int, experts: range) -> Iterator[Weight]:
    mixture = architecture.mixture is not None and architecture.mixture.layers[layer]
    for entry in _entries(architecture, ("layer", "mixture" if mixture else "dense")):
        if "{expert}" not in entry.parameter:
            yield _weight(architecture, entry, layer)
    for expert in experts if mixture else ():
        for entry in _entries(architecture, ("mixture",)):
            if "{expert}" in entry.parameter:
                yield _weight(architecture, entry, layer, expert)


def chunk_weights(architecture: Architecture, chunk: Chunk, experts: range) -> Iterator[Weight]:
    """Yields the whole parameters of a chunk with these experts; within a layer, those of experts come last."""
    if chunk.first:
        yield from (_weight(architecture, entry, None) for entry in _entries(architecture, ("first",)))
    for layer in chunk.layers:
        yield from _layer_weights(architecture, layer, experts)
    if chunk.last:
        for entry in _entries(architecture, ("last",)):
            weight = _weight(architecture, entry, None)
            if not (weight.copy and chunk.first):  # if both are in one chunk, the output weight is the embedding
                yield weight


def all_weights(architecture: Architecture) -> list[Weight]:
    """Returns every parameter of the model once, in the order of layers."""
    experts = range(architecture.mixture.experts if architecture.mixture else 0)
    whole = Chunk(range(architecture.layers), first=True, last=True)
    return list(chunk_weights(architecture, whole, experts))


def hf_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Returns name and shape of every tensor on disk, in the order of layers."""
    return {name: shape for weight in all_weights(architecture) for name, shape in weight.tensors}


def local_experts(architecture: Architecture, placement: ParameterPlacement) -> range:
    """Returns the experts of every mixture that a rank holds.

    Raises:
        ValueError: the experts cannot be divided evenly.
    """
    experts = architecture.mixture.experts if architecture.mixture else 0
    if experts % placement.expert_size:
        raise ValueError(f"{experts} experts cannot be divided evenly among {placement.expert_size} ranks")
    count = experts // placement.expert_size
    return range(placement.expert_rank * count, (placement.expert_rank + 1) * count)


def local_weights(
    architecture: Architecture, placement: ParameterPlacement, naming: Naming = PLAIN
) -> Iterator[LocalWeight]:
    """Yields the parameters that a rank holds, chunk by chunk.

    Raises:
        ValueError: a parameter cannot be sharded as the placement says.
    """
    experts = local_experts(architecture, placement)
    for index, chunk in enumerate(placement.chunks):
        for weight in chunk_weights(architecture, chunk, experts):
            name = weight.name(
                naming,
                layer=None if weight.layer is None else weight.layer - chunk.layers.start,
                expert=None if weight.expert is None else weight.expert - experts.start,
            )
            yield LocalWeight(weight, index, name, weight.shape(placement.padded_vocab, weight.shard(placement)[1]))


@cache
def parameter_count(architecture: Architecture) -> int:
    """Returns the number of weights and biases on disk; a tied embedding counts once."""
    return sum(weight.elements for weight in all_weights(architecture))


def local_parameter_count(architecture: Architecture, placement: ParameterPlacement) -> int:
    """Returns the number of elements that a rank holds, with padding, replicated and tied parameters."""
    return sum(math.prod(local.shape) for local in local_weights(architecture, placement))


def tied_copies(architecture: Architecture) -> set[str]:
    """Returns the names of the tensors that the embedding replaces in a tied model."""
    return {name for entry in TABLES[architecture.name] if entry.tied for name, _ in entry.tensors}


def check(architecture: Architecture, found: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns all differences between the tensors of a model on disk and the expected ones, one line each.

    The output weight of a tied model, which the embedding replaces, and :data:`IGNORED` are allowed.

    Args:
        architecture: Architecture of the model.
        found: Shapes by name.
    """
    wanted = hf_tensors(architecture)
    problems = [f"{name}: missing, expected {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{name}: has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    spare = tied_copies(architecture) if architecture.tied else set()
    problems += [
        f"{name}: unexpected; {architecture.name} has no such tensor"
        for name in found
        if name not in wanted and name not in spare and not IGNORED.fullmatch(name)
    ]
    return problems
