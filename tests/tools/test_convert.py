"""The converters: what they write, what they refuse, their exit codes."""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fipo_megatron import convert
from fipo_megatron.actor import hf_conversion as converter
from tests.actor.models import random_model

ROOT = Path(__file__).parents[2]
TO_MEGATRON, TO_HF = "hf-to-megatron", "megatron-to-hf"


def run(*arguments):
    """Runs the converter in this process; returns the exit code and everything printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = convert.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def run_on_two_ranks(*command):
    """Runs a module under torchrun; returns the exit code and everything printed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes a complete model in several files."""
    path = tmp_path_factory.mktemp("convert") / "model"
    random_model("qwen3 moe").save_pretrained(path, max_shard_size=50_000)
    vocab = {f"t{i}": i for i in range(60)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def checkpoint(model):
    target = model.with_name("checkpoint")
    command = ("fipo_megatron.convert", TO_MEGATRON, model, target, "--verify", "--tensor-parallel", 2)
    code, text = run_on_two_ranks(*command)
    assert code == 0, text
    assert f"{target}: " in text
    assert "verifying" in text
    return target


def on_disk(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_there_and_back_under_torchrun(model, checkpoint, tmp_path):
    target = tmp_path / "hf"
    code, text = run_on_two_ranks("tools.convert_megatron_to_hf", checkpoint, target, "--verify")  # pipeline stages
    assert code == 0, text
    mine, original = on_disk(target), on_disk(model)
    assert mine.keys() == original.keys()
    assert all(torch.equal(mine[name], original[name]) for name in original)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (model / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, random_model("qwen3 moe")(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(target)("t5 t7")["input_ids"] == [5, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_dtype_and_files_from_elsewhere(model, checkpoint, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(model / "config.json", other)
    code, text = run(TO_HF, checkpoint, tmp_path / "hf", "--dtype", "float16", "--hf", other, "--verify")
    assert code == 0, text
    original = on_disk(model)
    assert all(torch.equal(tensor, original[name].half()) for name, tensor in on_disk(tmp_path / "hf").items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_names_and_shapes_only(model, checkpoint):
    for command in ((TO_MEGATRON, model), (TO_HF, checkpoint)):
        code, text = run(*command, "--meta", "--tensor-parallel", 2, "--expert-parallel", 2, "--pipeline-parallel", 2)
        assert code == 0, text
        count = sum(parameter.numel() for parameter in random_model("qwen3 moe").parameters())
        assert f"Qwen3MoeForCausalLM: {len(on_disk(model))} tensors, {count:,} parameters" in text
        assert "per rank (tensor 2, pipeline 2, expert 2): " in text
    code, text = run(TO_MEGATRON, model, "--meta", "--tensor-parallel", 3)
    assert code == 1
    assert "actor.parallel.tensor_parallel = 3: must divide the model's attention heads, 4; valid: 1, 2" in text


def test_nothing_of_megatron_is_imported_to_check(model, checkpoint):
    """Both ways in one process: the operator's script and the module."""
    program = (
        "import sys, runpy\n"
        "for command in (sys.argv[1:4], sys.argv[4:]):\n"
        "    sys.argv = command\n"
        "    try: runpy.run_module(command[0], run_name='__main__')\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print('megatron' in {name.partition('.')[0] for name in sys.modules})"
    )
    commands = ("tools.convert_hf_to_megatron", model, "--meta", "fipo_megatron.convert", TO_HF, checkpoint, "--meta")
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, commands)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("exit 0\n") == 2, done.stdout + done.stderr
    assert done.stdout.endswith("exit 0\nFalse\n"), done.stdout + done.stderr


def test_what_is_refused(model, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = on_disk(broken)
    for file in broken.glob("model*"):
        file.unlink()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    for extra in ((tmp_path / "out",), ("--meta",)):
        code, text = run(TO_MEGATRON, broken, *extra)
        assert code == 1
        assert "model.norm.weight: missing, expected [32]" in text
        assert "model.layers.1.mlp.experts.3.up_proj.weight: missing, expected [24, 32]" in text
        assert "Traceback" not in text
    code, text = run(TO_MEGATRON, model, checkpoint)
    assert (code, "it is not overwritten" in text) == (1, True), text
    code, text = run(TO_HF, model, tmp_path / "out")
    assert (code, "huggingface/config.json: missing" in text) == (1, True), text
    assert run(TO_MEGATRON, model)[0] == 2
    assert run(TO_HF, checkpoint, tmp_path / "out", "--dtype", "int8")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("command", [TO_MEGATRON, TO_HF])
def test_a_full_disk_leaves_nothing(command, model, checkpoint, tmp_path):
    source = model if command == TO_MEGATRON else checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code, text = run(command, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 3, text
    assert "File too large" in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_differences_are_found_and_not_published(model, tmp_path, monkeypatch):
    """The weights change between reading and writing, so the result differs from the source."""
    load = converter.load_hf

    def load_wrong(chunks, *rest, **more):
        load(chunks, *rest, **more)
        with torch.no_grad():
            dict(chunks[0].named_parameters())["decoder.layers.1.self_attention.linear_qkv.weight"][0, 0] += 1e-3

    monkeypatch.setattr(converter, "load_hf", load_wrong)
    code, text = run(TO_MEGATRON, model, tmp_path / "out", "--verify")
    assert code == 4, text
    assert "1 tensors differ" in text
    assert "model.layers.1.self_attn.q_proj.weight" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["to Megatron", "to Hugging Face"])
def test_damage_before_publishing_is_found(way, model, checkpoint, tmp_path, monkeypatch):
    """A bit flips, or the end of a file is lost, between writing and reading again."""

    def damaged(save, pattern, damage):
        def save_and_damage(*rest, verify, **more):
            def damage_and_verify(written):
                [file] = written.glob(pattern)
                file.write_bytes(damage(file.read_bytes()))
                verify(written)

            save(*rest, verify=damage_and_verify, **more)

        return save_and_damage

    if way == "to Megatron":
        flip = damaged(converter.save_weights, "__0_0.distcp", lambda b: b[:9999] + bytes([b[9999] ^ 1]) + b[10_000:])
        monkeypatch.setattr(converter, "save_weights", flip)
        code, text = run(TO_MEGATRON, model, tmp_path / "out", "--verify")
        expected = "corrupt: its SHA-256"
    else:
        cut = damaged(converter.save_hf, "model.safetensors", lambda b: b[:-100])
        monkeypatch.setattr(converter, "save_hf", cut)
        code, text = run(TO_HF, checkpoint, tmp_path / "out", "--verify")
        expected = "truncated or corrupt"
    assert (code, expected in text) == (4, True), text
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_from_elsewhere_is_checked(model, checkpoint, tmp_path):
    shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "other" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 500}}}')
    for extra in (tmp_path / "out", "--meta"):
        code, text = run(TO_HF, checkpoint, extra, "--hf", tmp_path / "other")
        assert code == 1, text
        assert "token 500 has no row in the embedding" in text


@pytest.mark.parametrize(
    ("environment", "layers", "stages"),
    [
        ({}, 28, 1),
        ({"SLURM_NTASKS": "4"}, 28, 1),  # in a shell of salloc there is one process
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, 28, 4),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 28, 4),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 94, 2),
    ],
)
def test_stages_by_default(environment, layers, stages, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = argparse.Namespace(tensor_parallel=None, expert_parallel=None, pipeline_parallel=None, meta=False)
    assert convert.parallel_config(given, layers).pipeline_parallel == stages
