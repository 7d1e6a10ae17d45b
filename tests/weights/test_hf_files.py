"""Planned safetensors files, written in any order, are read by the safetensors library; all files appear or none."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.weights import hf_files

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7),
    "c": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)),
    "d": torch.randn(2, 3),
    "e": torch.randn(100),
}
OWNERS = {"a": 0, "b": 0, "c": 0, "d": 4, "e": 4}


def plan(max_file_bytes, dtype=torch.float32):
    return hf_files.plan_files([(n, tuple(t.shape), OWNERS[n]) for n, t in TENSORS.items()], dtype, max_file_bytes)


def test_files_are_bounded_and_have_one_owner():
    files = plan(100)
    assert [(list(file.offsets), file.owner) for file in files] == [
        (["a", "b"], 0),  # 60 + 28 bytes
        (["c"], 0),
        (["d"], 4),
        (["e"], 4),  # larger than the bound
    ]
    assert files[1].name == "model-00002-of-00004.safetensors"
    assert [list(file.offsets) for file in plan(1 << 20)] == [["a", "b", "c"], ["d", "e"]]
    [single] = hf_files.plan_files([("a", (2,), 1)], torch.bfloat16, 1)
    assert single.name == "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_in_any_order_and_read_by_safetensors(dtype, tmp_path):
    files = plan(100, dtype)
    with hf_files.TensorWriter(tmp_path, files, dtype) as writer:
        for name in ("e", "c", "a", "d", "b"):
            tensor = TENSORS[name]
            writer.write(name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
        writer.finish()
    for file in files:
        found = load_file(tmp_path / file.name)
        assert list(found) == list(file.offsets)
        assert all(torch.equal(tensor, TENSORS[name].to(dtype)) for name, tensor in found.items())
        content = (tmp_path / file.name).read_bytes()
        assert len(content) == file.size
        assert struct.unpack("<Q", content[:8])[0] % 8 == 0
        assert json.loads(content[8 : len(file.header)])["__metadata__"] == {"format": "pt"}


def test_every_planned_tensor_is_written_once(tmp_path):
    with hf_files.TensorWriter(tmp_path, plan(1000), torch.float32) as writer:
        writer.write("a", TENSORS["a"])
        with pytest.raises(KeyError, match="a"):
            writer.write("a", TENSORS["a"])
        with pytest.raises(RuntimeError, match="planned but not written: b, c, d, e"):
            writer.finish()


@pytest.mark.parametrize(("key", "other"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype")])
def test_what_comes_beside_the_weights(key, other, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json: missing"):
        hf_files.check_source(source)
    (source / "config.json").write_text(json.dumps({key: "float32", "more": [1]}))
    (source / "merges.txt").write_text("a b")
    (source / "weights.bin").write_text("not this one")
    hf_files.check_source(source)
    files = plan(100, torch.bfloat16)
    hf_files.add_companions(source, target)
    assert json.loads((target / "config.json").read_text()) == {key: "float32", "more": [1]}
    hf_files.add_companions(source, target, torch.bfloat16)
    hf_files.add_index(target, files)
    config = json.loads((target / "config.json").read_text())
    assert config == {key: "bfloat16", "more": [1]}
    assert other not in config
    assert (target / "merges.txt").read_text() == "a b"
    assert not (target / "weights.bin").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in file.offsets}
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in TENSORS.values())


def test_one_file_has_no_index(tmp_path):
    hf_files.add_index(tmp_path, hf_files.plan_files([("a", (2,), 1)], torch.bfloat16, 1))
    assert not list(tmp_path.iterdir())
