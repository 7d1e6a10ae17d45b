"""The tables compared with published sizes, transformers' files and Megatron's names; no weights are allocated."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import FAMILIES, Architecture
from fipo_megatron.weights.placement import PLAIN, Chunk, Naming, ParameterPlacement, even_chunks
from tests.actor.models import MODELS, random_model

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
TOTALS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
MODEL_OF = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama3"}


def real(name):
    return Architecture.from_hf(json.loads(CONFIGS[name].read_text()))


def tiny(name):
    return Architecture.from_hf(random_model(name).config.to_dict())


def rank_placements(architecture, tensor, pipeline, virtual=1, expert=1, expert_tensor=None, vocab_multiple=1):
    """Yields every rank's placement once, in the smallest world."""
    expert_tensor = expert_tensor or (1 if expert > 1 else tensor)
    width = math.lcm(tensor, expert * expert_tensor)
    for stage in range(pipeline):
        chunks = even_chunks(architecture.layers, stage, pipeline, virtual)
        for rank in range(width):
            yield ParameterPlacement(
                chunks,
                architecture.padded_vocab(vocab_multiple * tensor),
                rank % tensor,
                tensor,
                rank // expert_tensor % expert,
                expert,
                rank % expert_tensor,
                expert_tensor,
            )


def test_every_architecture_has_a_table_and_a_real_model():
    assert tables.TABLES.keys() == FAMILIES.keys()
    assert {real(name).name for name in CONFIGS} == FAMILIES.keys()
    assert CONFIGS.keys() == TOTALS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_totals_are_the_published_ones(name):
    architecture = real(name)
    assert tables.parameter_count(architecture) == TOTALS[name]
    assert sum(math.prod(shape) for shape in tables.hf_tensors(architecture).values()) == TOTALS[name]
    uses = Counter(tensor for weight in tables.all_weights(architecture) for tensor, _ in weight.tensors)
    assert set(uses.values()) == {1}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name):
    """For mixtures, transformers holds the experts of a layer in one tensor."""
    import transformers

    config = json.loads(CONFIGS[name].read_text())
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if "mlp.experts." not in name}
    found = tables.hf_tensors(real(name))
    assert wanted == {name: shape for name, shape in found.items() if "mlp.experts." not in name}
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_on_disk(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    architecture = tiny(name)
    assert tables.hf_tensors(architecture) == shapes
    assert tables.check(architecture, shapes) == []


LAYOUTS = {
    "TP8 PP4": {"tensor": 8, "pipeline": 4, "vocab_multiple": 128},
    "TP4 PP2 VPP2": {"tensor": 4, "pipeline": 2, "virtual": 2},
    "TP2 PP4, padded to 5000": {"tensor": 2, "pipeline": 4, "vocab_multiple": 5000},
}
MIXTURE_LAYOUTS = {
    "TP4 PP4 EP8": {"tensor": 4, "pipeline": 4, "expert": 8},
    "EP8 ETP1": {"tensor": 1, "pipeline": 1, "expert": 8},
    "TP2 PP2 EP8 ETP2": {"tensor": 2, "pipeline": 2, "expert": 8, "expert_tensor": 2},
}


def cases():
    for name in CONFIGS:
        layouts = LAYOUTS | (MIXTURE_LAYOUTS if "A3B" in name else {})
        for layout, sizes in layouts.items():
            architecture = real(name)
            runs = sizes["pipeline"] * sizes.get("virtual", 1)
            if architecture.kv_groups % sizes["tensor"] == 0 and architecture.layers % runs == 0:
                yield pytest.param(name, sizes, id=f"{name}, {layout}")


@pytest.mark.parametrize(("name", "sizes"), list(cases()))
def test_ranks_add_up_to_the_model(name, sizes):
    """All ranks together hold the model, copies of norms and routers, padding, experts' replicas, a tied output."""
    architecture = real(name)
    everywhere = list(rank_placements(architecture, **sizes))
    held = sum(tables.local_parameter_count(architecture, placement) for placement in everywhere)

    stages, tensor = sizes["pipeline"], sizes["tensor"]
    width = len(everywhere) // stages
    hidden, layers = architecture.hidden, architecture.layers
    mixture = architecture.mixture
    experts = layers * mixture.experts * 3 * hidden * mixture.ffn if mixture else 0
    router = mixture.experts * hidden if mixture else 0
    qk_norms = 2 * architecture.head_dim if architecture.family.qk_norm else 0
    whole = layers * (2 * hidden + qk_norms + router) + hidden
    padded = architecture.padded_vocab(sizes.get("vocab_multiple", 1) * tensor)
    ends = 2 if stages > 1 or not architecture.tied else 1
    cut = TOTALS[name] - experts - whole - (1 if architecture.tied else 2) * architecture.vocab * hidden
    dense = cut + ends * padded * hidden
    expert_ranks = everywhere[0].expert_size * everywhere[0].expert_tensor_size
    assert held == width * whole + width // tensor * dense + (width // expert_ranks * experts if experts else 0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Qwen2.5-32B", LAYOUTS["TP8 PP4"]),
        ("Llama-3.1-70B", LAYOUTS["TP4 PP2 VPP2"]),
        ("Qwen3-30B-A3B", MIXTURE_LAYOUTS["TP4 PP4 EP8"]),
        ("Qwen3-30B-A3B", MIXTURE_LAYOUTS["TP2 PP2 EP8 ETP2"]),
    ],
)
def test_every_row_of_every_tensor_is_on_some_rank(name, sizes):
    """Pieces of one shard do not overlap, and the ranks together hold every element of every tensor."""
    architecture = real(name)
    covered = {tensor: set() for tensor in tables.hf_tensors(architecture)}
    for placement in rank_placements(architecture, **sizes):
        for local in tables.local_weights(architecture, placement):
            end = 0
            for piece in local.weight.pieces(*local.weight.shard(placement), placement.padded_vocab):
                assert piece.offset == end
                end += piece.size
                covered[piece.tensor].add((piece.start, piece.stop))
            assert end == local.shape[local.weight.entry.axis or 0] or local.weight.entry.padded
    for tensor, shape in tables.hf_tensors(architecture).items():
        spans = sorted(covered[tensor])
        assert spans[0][0] == 0, tensor
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans)), tensor
        assert spans[-1][1] in shape, tensor


def test_blocks_of_queries_keys_and_values():
    architecture = tiny("qwen3")  # 4 heads and 2 groups of width 16
    [weight] = [w for w in tables.all_weights(architecture) if w.name() == QKV.format(0)]
    assert weight.shape(64) == (128, 32)
    pieces = [(p.tensor[-13], p.start, p.stop, p.offset) for p in weight.pieces(1, 2, 64)]
    assert pieces == [("q", 32, 64, 0), ("k", 16, 32, 32), ("v", 16, 32, 48)]
    whole = [(p.tensor[-13], p.start, p.stop, p.offset) for p in weight.pieces(0, 1, 64)]
    assert whole[:3] == [("q", 0, 32, 0), ("k", 0, 16, 32), ("v", 0, 16, 48)]
    assert whole[3:] == [("q", 32, 64, 64), ("k", 16, 32, 96), ("v", 16, 32, 112)]


QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"


def test_padding_of_the_vocabulary_can_fill_a_rank():
    architecture = tiny("qwen3")  # 61 tokens
    embedding = tables.all_weights(architecture)[0]
    parts = [[(p.start, p.stop, p.offset) for p in embedding.pieces(part, 4, 96)] for part in range(4)]
    assert parts == [[(0, 24, 0)], [(24, 48, 0)], [(48, 61, 0)], []]
    assert embedding.shape(96, 4) == (24, 32)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_names_with_transformer_engine(kind):
    """Names follow ``get_gpt_layer_with_transformer_engine_spec`` of Megatron-Core."""
    architecture = tiny("qwen3 moe" if kind == "mixture" else "qwen3")
    placement = ParameterPlacement((Chunk(range(1, 2), first=False, last=False),), 64, expert_rank=1, expert_size=2)
    placement = placement if kind == "mixture" else ParameterPlacement(placement.chunks, 64)
    naming = Naming(fused_norms=True, grouped_experts=True)
    names = [
        local.name.removeprefix("decoder.layers.0.") for local in tables.local_weights(architecture, placement, naming)
    ]
    attention = ["linear_qkv.weight", "linear_proj.weight", "q_layernorm.weight", "k_layernorm.weight"]
    wanted = [f"self_attention.{name}" for name in [*attention, "linear_qkv.layer_norm_weight"]]
    if kind == "dense":
        wanted += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "mlp.linear_fc1.layer_norm_weight"]
    else:
        wanted += ["mlp.router.weight", "pre_mlp_layernorm.weight"]
        wanted += [f"mlp.experts.linear_fc{matrix}.weight{expert}" for matrix in (1, 2) for expert in (0, 1)]
    assert sorted(names) == sorted(wanted)
    assert Naming.from_parameter_names(names) == Naming(fused_norms=True, grouped_experts=kind == "mixture")
    plain = [local.name for local in tables.local_weights(architecture, placement)]
    assert Naming.from_parameter_names(plain) == PLAIN
    if kind == "mixture":
        assert "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight" in plain


def test_check_lists_every_difference():
    architecture = tiny("qwen2 untied")
    shapes = tables.hf_tensors(architecture)
    del shapes["lm_head.weight"], shapes["model.layers.1.self_attn.q_proj.bias"]
    shapes |= {"model.norm.weight": (31,), "model.norm.bias": (32,)}
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    problems = tables.check(architecture, shapes)
    assert sorted(problems) == [
        "lm_head.weight: missing, expected [61, 32]",
        "model.layers.1.self_attn.q_proj.bias: missing, expected [32]",
        "model.norm.bias: unexpected; Qwen2ForCausalLM has no such tensor",
        "model.norm.weight: has shape [31], expected [32]",
    ]


def test_what_cannot_be_cut_is_refused():
    architecture = tiny("qwen3 moe")
    with pytest.raises(
        ValueError, match=r"linear_qkv.weight: 128 along axis 0, in 2 blocks, cannot be divided into 4 shards"
    ):
        tables.local_parameter_count(architecture, ParameterPlacement(even_chunks(2, 0, 1), 64, tensor_size=4))
    with pytest.raises(ValueError, match="4 experts cannot be divided evenly among 3 ranks"):
        tables.local_parameter_count(architecture, ParameterPlacement(even_chunks(2, 0, 1), 64, expert_size=3))
    with pytest.raises(ValueError, match="2 layers cannot be split evenly over 2 stages with 2 chunks each"):
        even_chunks(2, 0, 2, 2)


@pytest.mark.processes
def test_imports_neither_megatron_nor_transformers():
    code = (
        "import sys, fipo_megatron.weights.tables, fipo_megatron.weights.hf_directory, fipo_megatron.weights.hf_files;"
        "sys.exit(any(m.split('.')[0] in ('megatron', 'transformers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
