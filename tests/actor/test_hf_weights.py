"""Weights to Megatron and back on one rank, against transformers' own files and an independent mapping."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fipo_megatron.actor import parallel
from fipo_megatron.actor.hf_weights import export_hf, load_hf, local_parameters, save_hf
from fipo_megatron.actor.model import build_model
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError
from tests.actor import hf_reference
from tests.actor.models import MODELS, logits, random_model

FLOAT32 = ActorConfig(dtype="float32", vocab_multiple=8)  # 61 tokens: the embedding is padded


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes a model of ``MODELS`` with transformers, in several files."""
    made = {}

    def save(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / "model"
            random_model(name).save_pretrained(made[name], max_shard_size=30_000)
        return made[name]

    return save


def on_disk(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def build(path, layout, actor=FLOAT32):
    architecture = Architecture.from_directory(path)
    return architecture, build_model(architecture, actor, layout)


def snapshot(chunks):
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def same(left, right):
    """Asserts equal names, shapes, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def exported(chunks, architecture, layout, **options):
    found = [entry for bucket in export_hf(chunks, architecture, layout, **options) for entry in bucket]
    assert len(dict(found)) == len(found), "a tensor came twice"
    return {name: tensor.clone() for name, tensor in found}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(name, saved, layout, tmp_path):
    path = saved(name)
    architecture, chunks = build(path, layout)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(torch.nan)
    load_hf(chunks, architecture, layout, path)
    mine = snapshot(chunks)
    hf_reference.load(chunks[0], random_model(name).state_dict(), architecture, layout)
    assert all(torch.equal(a, b) for a, b in zip(mine, snapshot(chunks), strict=True))
    for bucket_bytes in (1, 20_000, 1 << 30):
        same(exported(chunks, architecture, layout, bucket_bytes=bucket_bytes), on_disk(path))
    save_hf(chunks, architecture, layout, path, tmp_path / "out", max_file_bytes=30_000)
    same(on_disk(tmp_path / "out"), on_disk(path))
    family, _ = MODELS[name]
    again = getattr(transformers, f"{family}ForCausalLM").from_pretrained(tmp_path / "out")
    same(again.state_dict(), random_model(name).state_dict())


@pytest.mark.parametrize("name", ["qwen2", "qwen3 yarn", "llama3", "qwen3 moe"])
def test_logits_are_those_of_transformers(name, saved, layout):
    architecture, chunks = build(saved(name), layout)
    load_hf(chunks, architecture, layout, saved(name))
    ids = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        [mine] = logits(chunks[0], [ids])
        torch.testing.assert_close(mine, random_model(name)(ids[None]).logits[0], atol=1e-5, rtol=0)


def test_buckets_are_bounded(saved, layout):
    architecture, chunks = build(saved("qwen3 moe"), layout)
    sizes = []
    for bucket in export_hf(chunks, architecture, layout, bucket_bytes=10_000):
        sizes.append((sum(tensor.nbytes for _, tensor in bucket), len(bucket)))
    assert all(size <= 10_000 for size, count in sizes if count > 3)
    assert len(sizes) > 5


def test_ranks_that_need_nothing_get_none(saved, layout):
    architecture, chunks = build(saved("qwen3"), layout)
    found = [entry for bucket in export_hf(chunks, architecture, layout, on_ranks=[1]) for entry in bucket]
    assert [name for name, _ in found] == list(exported(chunks, architecture, layout))
    assert not any(tensor is not None for _, tensor in found)


def test_values_are_cast(saved, layout, tmp_path):
    path = saved("qwen2")
    architecture, chunks = build(path, layout, replace(FLOAT32, dtype="bfloat16"))
    load_hf(chunks, architecture, layout, path)
    wanted = {name: tensor.bfloat16() for name, tensor in on_disk(path).items()}
    same(exported(chunks, architecture, layout), wanted)
    save_hf(chunks, architecture, layout, path, tmp_path / "half", dtype=torch.float16)
    same(on_disk(tmp_path / "half"), {name: tensor.half() for name, tensor in wanted.items()})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert [file.name for file in (tmp_path / "half").glob("model*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match=r"dtype = torch.float64: must be one of"):
        save_hf(chunks, architecture, layout, path, tmp_path / "wide", dtype=torch.float64)


def test_companions_come_along(saved, layout, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(saved("qwen2"), source)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_text("not this one")
    architecture, chunks = build(source, layout)
    save_hf(chunks, architecture, layout, source, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    }


def break_missing_file(path):
    file = sorted(path.glob("model*.safetensors"))[1]
    file.unlink()
    return [f"{file}: missing"]


def break_truncated(path):
    file = sorted(path.glob("model*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-4])
    return [f"{file}: truncated or corrupt"]


def break_corrupt(path):
    file = sorted(path.glob("model*.safetensors"))[0]
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    return [f"{file}: truncated or corrupt"]


def break_index(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": [')
    return ["model.safetensors.index.json: not JSON"]


def break_no_files(path):
    for file in path.glob("model*"):
        file.unlink()
    return ["holds neither model.safetensors nor model.safetensors.index.json"]


def rewrite(path, change):
    """Rewrites the tensors, changed, in one file."""
    tensors = on_disk(path)
    change(tensors)
    for file in path.glob("model*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")


def break_tensors(path):
    def change(tensors):
        del tensors["model.layers.0.self_attn.k_proj.bias"], tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 32)
        tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(32)
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)

    rewrite(path, change)
    return [
        "6 problems",
        "model.layers.0.self_attn.k_proj.bias: missing, expected [16]",
        "model.norm.weight: missing, expected [32]",
        "model.layers.1.mlp.up_proj.weight: has shape [47, 32], expected [48, 32]",
        "model.layers.1.mlp.down_proj.weight: has shape [48, 32], expected [32, 48]",
        "model.layers.2.input_layernorm.weight: unexpected; Qwen2ForCausalLM has no such tensor",
        "model.layers.0.self_attn.o_proj.bias: unexpected",
    ]


def break_dtype(path):
    def change(tensors):
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(path, change)
    return [
        "2 problems",
        "model.norm.weight: dtype F8_E4M3 is not supported; valid: F32, BF16, F16",
        "model.layers.0.mlp.up_proj.weight: dtype F8_E4M3",
    ]


def break_place(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    at = content["weight_map"]["model.norm.weight"]
    other = next(file for file in files if file != at)
    content["weight_map"]["model.norm.weight"] = other
    index.write_text(json.dumps(content))
    return [f"model.norm.weight: the index says it is in {other}, which does not have it"]


def break_tokenizer(path):
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 60}}, "added_tokens": [{"id": 61}]}')
    return [": 1 problem\n", "tokenizer.json: token 61 has no row in the embedding; config.json: vocab_size = 61"]


def break_tokenizer_file(path):
    (path / "tokenizer.json").write_text("{")
    return ["tokenizer.json: not JSON"]


BREAKS = [
    break_missing_file,
    break_truncated,
    break_corrupt,
    break_index,
    break_no_files,
    break_tensors,
    break_dtype,
    break_place,
    break_tokenizer,
    break_tokenizer_file,
]


@pytest.mark.parametrize("damage", BREAKS)
def test_bad_files_are_refused_before_anything_is_touched(damage, saved, layout, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(saved("qwen2"), path)
    architecture, chunks = build(path, layout)
    before = snapshot(chunks)
    expected = damage(path)
    with pytest.raises(WeightsError) as raised:
        load_hf(chunks, architecture, layout, path)
    for line in expected:
        assert line in str(raised.value)
    if damage is not break_tensors:
        assert str(raised.value).count(": missing, expected") == (damage is break_place), "one cause, one line"
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(chunks), strict=True))


def test_a_tied_output_weight_on_disk_is_not_unexpected(saved, layout, tmp_path):
    shutil.copytree(saved("qwen2"), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 32)}))
    architecture, chunks = build(tmp_path / "model", layout)
    load_hf(chunks, architecture, layout, tmp_path / "model")
    same(exported(chunks, architecture, layout), on_disk(saved("qwen2")))


def test_a_model_that_the_table_does_not_describe_is_refused(saved, layout):
    _, chunks = build(saved("qwen3"), layout)
    other = replace(Architecture.from_directory(saved("qwen2 untied")), ffn=50)
    with pytest.raises(RuntimeError, match="does not fit the model") as raised:
        list(local_parameters(chunks, other, layout))
    assert "decoder.layers.0.self_attention.q_layernorm.weight: in the model only" in str(raised.value)
    assert "decoder.layers.1.self_attention.linear_qkv.bias: in the table only" in str(raised.value)
    assert "mlp.linear_fc1.weight: shape [96, 32], by the table [100, 32]" in str(raised.value)


def test_existing_target_is_kept(saved, layout, tmp_path):
    architecture, chunks = build(saved("qwen2"), layout)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    with pytest.raises(FileExistsError, match="it is not overwritten"):
        save_hf(chunks, architecture, layout, saved("qwen2"), tmp_path / "out")
    assert [file.name for file in tmp_path.glob("**/*")] == ["out", "precious"]


def test_failed_save_leaves_nothing(saved, layout, tmp_path):
    """A file size limit of the operating system simulates a full disk: writing fails half-way."""
    import resource
    import signal

    architecture, chunks = build(saved("qwen2"), layout)
    load_hf(chunks, architecture, layout, saved("qwen2"))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_hf(chunks, architecture, layout, saved("qwen2"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
    save_hf(chunks, architecture, layout, saved("qwen2"), tmp_path / "out")
    same(on_disk(tmp_path / "out"), on_disk(saved("qwen2")))
