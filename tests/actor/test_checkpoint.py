"""Weights in Megatron's torch_dist format on one rank: exact, under Megatron's own names, complete or absent."""

import os
import pickle
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.distributed.checkpoint import FileSystemReader

from fipo_megatron.actor import model, parallel, sharded_checkpoint
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.actor.model import SequenceParallelRMSNorm, build_model
from fipo_megatron.actor.sharded_checkpoint import load_weights, save_weights
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError
from tests.actor.models import MODELS, logits, random_model

FLOAT32 = ActorConfig(dtype="float32", vocab_multiple=8)  # 61 tokens: the embedding is padded


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, layout):
    """Writes a model of ``MODELS`` with transformers, and a checkpoint of it."""
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("saved")
            random_model(name).save_pretrained(made[name] / "hf")
            architecture, chunks = build(made[name])
            load_hf(chunks, architecture, layout, made[name] / "hf")
            save_weights(chunks, layout, made[name] / "hf", made[name] / "megatron")
        return made[name]

    def build(path, actor=FLOAT32):
        architecture = Architecture.from_directory(path / "hf")
        return architecture, build_model(architecture, actor, layout)

    save.build = build
    return save


def forget(chunks):
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(torch.nan)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact_under_the_expected_names(name, saved, layout):
    path = saved(name)
    architecture, chunks = saved.build(path)
    load_hf(chunks, architecture, layout, path / "hf")
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    forget(chunks)
    load_weights(chunks, architecture, layout, path / "megatron")
    assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
    # Upstream's own reader, not ours.
    stored = FileSystemReader(path / "megatron").read_metadata().state_dict_metadata
    wanted = torch_dist.checkpoint_tensors(architecture)
    tensors = {key: tuple(value.size) for key, value in stored.items() if "_extra_state" not in key}
    assert tensors == {key: (64, *shape[1:]) if key in torch_dist.PADDED else shape for key, shape in wanted.items()}
    content = dist_checkpointing.load_content_metadata(str(path / "megatron"))
    assert content == sharded_checkpoint.CONTENT
    assert torch_dist.check(path / "megatron", architecture) is torch.float32


def test_values_are_cast_and_padding_may_differ(saved, layout):
    path = saved("qwen2 untied")
    architecture, chunks = saved.build(path)
    load_hf(chunks, architecture, layout, path / "hf")
    other = ActorConfig(dtype="bfloat16", vocab_multiple=50)
    _, half = saved.build(path, other)
    forget(half)
    load_weights(half, architecture, layout, path / "megatron")
    for (name, mine), theirs in zip(half[0].named_parameters(), chunks[0].parameters(), strict=True):
        if name in torch_dist.PADDED:
            assert len(mine) == 100
            assert not mine[61:].any()
            mine, theirs = mine[:61], theirs[:61]
        assert torch.equal(mine, theirs.bfloat16()), name


class FusedNormLinear(ColumnParallelLinear):
    """A layer like Transformer Engine's: the norm is part of the matrix that follows, and there is extra state."""

    def __init__(self, input_size, output_size, *, config, **rest):
        super().__init__(input_size, output_size, config=config, **rest)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon
        self.register_buffer("_extra_state", torch.zeros(1))

    def forward(self, hidden, *rest, **more):
        norm = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)
        return super().forward(norm * self.layer_norm_weight, *rest, **more)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        # TELayerNormColumnParallelLinear.sharded_state_dict: its own weights cut along axis 0, the norm whole.
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
def test_layers_named_as_transformer_engine_names_them_load_it(name, saved, layout, monkeypatch):
    """Layers with the names and shards of Transformer Engine, which needs a GPU, replace it."""
    path = saved(name)
    ours = model._block_spec

    def fused_spec(config, stage):
        block = ours(config, stage)
        for layer in block.layer_specs:
            parts = layer.submodules
            parts.input_layernorm = parts.pre_mlp_layernorm = torch.nn.Identity
            parts.self_attention.submodules.linear_qkv = FusedNormLinear
            mlp = parts.mlp.keywords["submodules"] if isinstance(parts.mlp, partial) else parts.mlp.submodules
            mlp.linear_fc1 = FusedNormLinear
            parts.sharded_state_dict_keys_map = {}
        return block

    class Identity(torch.nn.Identity):
        def __init__(self, *_, **__):
            super().__init__()

    monkeypatch.setattr(torch.nn, "Identity", Identity)
    monkeypatch.setattr(model, "_block_spec", fused_spec)
    architecture, chunks = saved.build(path)
    names = dict(chunks[0].named_parameters())
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert not any("input_layernorm" in name for name in names)
    assert any("_extra_state" in key for key in chunks[0].sharded_state_dict(metadata=dict(sharded_checkpoint.CONTENT)))
    forget(chunks)
    load_weights(chunks, architecture, layout, path / "megatron")
    ids = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        [mine] = logits(chunks[0], [ids])
        torch.testing.assert_close(mine, random_model(name)(ids[None]).logits[0], atol=1e-5, rtol=0)


def test_norms_before_mixtures_have_a_name_of_their_own(saved):
    """Transformer Engine's layers fuse this norm with dense layers only."""
    _, chunks = saved.build(saved("qwen3 moe, some dense"))
    keys = {
        shard.key
        for shards in sharded_checkpoint.sharded_weights(chunks).values()
        for shard in shards.values()
        if hasattr(shard, "key")
    }
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in keys
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in keys
    assert isinstance(chunks[0].decoder.layers[0].pre_mlp_layernorm, SequenceParallelRMSNorm)


def damage_missing_file(path):
    (path / "__0_0.distcp").unlink()
    return ["__0_0.distcp: missing"]


def damage_truncated(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-9])
    return ["__0_0.distcp: truncated"]


def damage_a_bit(path):
    """Flips a bit, which torch reads without an error."""
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return ["__0_0.distcp: corrupt: its SHA-256 is not the one in checksums.json"]


def damage_checksums(path):
    (path / "checksums.json").write_text("[1]")
    return ["checksums.json: expected the SHA-256 of every file by its name"]


def damage_unfinished(path):
    (path / "metadata.json").unlink()
    return ["not a torch_dist checkpoint"]


def damage_common(path):
    (path / "common.pt").unlink()
    return ["common.pt: missing"]


def damage_metadata(path):
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-20])
    return [".metadata: truncated or corrupt"]


class Attack:
    def __reduce__(self):
        return (os.system, ("touch /tmp/fipo_megatron_was_here",))


def damage_code(path):
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    return [".metadata: truncated or corrupt", "is not allowed in the metadata of a checkpoint"]


def damage_code_by_attribute(path):
    """Names a method of a class that torch's module imports."""
    module, name = b"torch.distributed.checkpoint.filesystem", b"Path.touch"
    names = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    target = pickle.dumps(Path("/tmp/fipo_megatron_was_here"), protocol=4)[2:-1]
    (path / ".metadata").write_bytes(b"\x80\x04" + names + b"\x93" + target + b"\x85R.")
    return ["Path.touch is not allowed in the metadata of a checkpoint"]


def damage_parts(path):
    """Removes one half of a gated matrix from the metadata."""
    metadata = FileSystemReader(path).read_metadata()
    stored = metadata.state_dict_metadata["decoder.layers.1.mlp.linear_fc1.weight"]
    assert len(stored.chunks) == 2
    stored.chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return ["decoder.layers.1.mlp.linear_fc1.weight: parts of it are missing"]


def damage_place(path):
    metadata = FileSystemReader(path).read_metadata()
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if "final_layernorm" not in k.fqn}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return ["decoder.final_layernorm.weight: parts of it are missing"]


def damage_backend_file(path):
    (path / "metadata.json").write_text("[1]")
    return ["metadata.json: expected"]


def damage_companion(path):
    file = path / "huggingface" / "config.json"
    file.write_text(file.read_text().replace("1e-06", "1e-05"))
    return ["huggingface/config.json: corrupt"]


def damage_backend(path):
    (path / "metadata.json").write_text(
        '{"sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch"}'
    )
    return ["{'sharded_backend': 'zarr'}: expected"]


def damage_tokenizer(path):
    (path / "huggingface" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 61}}}')
    return ["token 61 has no row in the embedding"]


def damage_tensors(path):
    metadata = FileSystemReader(path).read_metadata()
    stored = metadata.state_dict_metadata
    stored["decoder.layers.7.more"] = stored.pop("decoder.layers.0.self_attention.linear_proj.weight")
    stored["decoder.layers.1.mlp.linear_fc1.weight"].size = torch.Size([94, 32])
    stored["embedding.word_embeddings.weight"].size = torch.Size([60, 32])
    stored["decoder.final_layernorm.weight"].properties.dtype = torch.float16
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return [
        "7 problems",  # with changed sizes, their parts do not add up either
        "decoder.layers.0.self_attention.linear_proj.weight: missing, expected [32, 32]",
        "decoder.layers.7.more: unexpected; Qwen2ForCausalLM has no such tensor",
        "decoder.layers.1.mlp.linear_fc1.weight: has shape [94, 32], expected [96, 32]",
        "embedding.word_embeddings.weight: has shape [60, 32], expected [61, 32]",
        "decoder.final_layernorm.weight: dtype torch.float16 is not supported; valid: torch.float32, torch.bfloat16",
    ]


DAMAGE = [
    damage_missing_file,
    damage_truncated,
    damage_a_bit,
    damage_checksums,
    damage_unfinished,
    damage_common,
    damage_metadata,
    damage_code,
    damage_code_by_attribute,
    damage_backend,
    damage_backend_file,
    damage_parts,
    damage_place,
    damage_companion,
    damage_tokenizer,
    damage_tensors,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoints_are_refused_before_anything_is_touched(damage, saved, layout, tmp_path):
    path = tmp_path / "megatron"
    shutil.copytree(saved("qwen2") / "megatron", path)
    architecture, chunks = saved.build(saved("qwen2"))
    before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
    expected = damage(path)
    with pytest.raises(WeightsError) as raised:
        load_weights(chunks, architecture, layout, path)
    for line in expected:
        assert line in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
    assert not os.path.exists("/tmp/fipo_megatron_was_here")


def test_mixed_dtypes_are_kept_exactly(saved, layout, tmp_path):
    path = tmp_path / "megatron"
    shutil.copytree(saved("qwen2") / "megatron", path)
    metadata = FileSystemReader(path).read_metadata()
    metadata.state_dict_metadata["embedding.word_embeddings.weight"].properties.dtype = torch.bfloat16
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch_dist.check(path, saved.build(saved("qwen2"))[0]) is torch.float32


def test_padding_becomes_zero(saved, layout, tmp_path):
    architecture, chunks = saved.build(saved("qwen2 untied"))
    load_hf(chunks, architecture, layout, saved("qwen2 untied") / "hf")
    with torch.no_grad():
        chunks[0].output_layer.weight[61:] = 7
    save_weights(chunks, layout, saved("qwen2 untied") / "hf", tmp_path / "out")
    load_weights(chunks, architecture, layout, tmp_path / "out")
    assert not chunks[0].output_layer.weight[61:].any()
    assert chunks[0].output_layer.weight[60].any()


def test_failed_save_leaves_nothing(saved, layout, tmp_path):
    """A file size limit of the operating system simulates a full disk: writing fails half-way."""
    architecture, chunks = saved.build(saved("qwen2"))
    load_hf(chunks, architecture, layout, saved("qwen2") / "hf")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_weights(chunks, layout, saved("qwen2") / "hf", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="it is not overwritten"):
        save_weights(chunks, layout, saved("qwen2") / "hf", tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=r"config.json: missing"):
        save_weights(chunks, layout, tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
