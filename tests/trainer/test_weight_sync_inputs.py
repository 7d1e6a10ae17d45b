"""Weights that could not be sent to the servers are noticed at start-up, with the numbers."""

import sys

import pytest
import torch

from fipo_megatron.config import load_config
from fipo_megatron.config.files import ConfigError
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.rollout.sglang.nccl_version import nccl_problem
from fipo_megatron.rollout.weight_sync import tensor_sender
from fipo_megatron.rollout.weight_sync.tensor_sender import size_problem
from fipo_megatron.trainer.training_inputs import read_training_inputs
from fipo_megatron.weights.architecture import Architecture
from tests.runs import arguments

PRESET = "examples/configs/fipo_qwen2.5_32b.yaml"
QWEN_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 131072,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


def test_a_run_is_refused_for_what_it_cannot_send(data, tmp_path, monkeypatch, cuda, python_of):
    """Both are found among the inputs, before anything is built."""

    def problem_of(*overrides):
        words = arguments(data, tmp_path / "run", "rollout.engine=sglang", *overrides)
        with pytest.raises(InputError) as raised:
            read_training_inputs(load_config(words[0], words[1:]))
        return str(raised.value)

    monkeypatch.setattr(tensor_sender, "MAX_REQUEST_BYTES", 1e5)
    assert problem_of("rollout.servers.sync=tensor").startswith("rollout.servers.sync = tensor: must be disk")
    assert "the servers' NCCL is 2.30.7, the trainer's is 2.28.9" in problem_of(python_of("2.30.7"))


def test_a_large_model_is_not_sent_in_requests():
    model = Architecture.from_hf(QWEN_32B)
    config = load_config(PRESET, ["rollout.servers.sync=tensor", "rollout.sglang={tp_size: 4}"])
    assert size_problem(config, model) == (
        "rollout.servers.sync = tensor: must be disk or distributed for this model; 65.5 GB of weights for each of "
        "rollout.sglang.tp_size = 4 ranks are 349 GB of base64 in requests to each server at every update, and tensor "
        "allows 2 GB"
    )
    colocated = load_config(PRESET, ["rollout.servers.sync=tensor", "rollout.servers.colocated=true"])
    assert "must be disk for this model; 65.5 GB" in size_problem(colocated, model)
    assert size_problem(load_config(PRESET, ["rollout.servers.sync=disk"]), model) is None


@pytest.mark.parametrize(("layers", "refused"), [(8, False), (9, True)])
def test_two_gigabytes_of_requests_are_the_limit(layers, refused):
    """1.9 or 2.1 GB in two ranks."""
    model = Architecture.from_hf(
        QWEN_32B
        | {"hidden_size": 1280, "intermediate_size": 5120, "vocab_size": 64000, "num_hidden_layers": layers}
        | {"num_attention_heads": 10, "num_key_value_heads": 10}
    )
    config = load_config(PRESET, ["rollout.servers.sync=tensor", "rollout.sglang={tp_size: 2}"])
    assert bool(size_problem(config, model)) == refused


@pytest.fixture
def cuda(monkeypatch):
    """A trainer on GPUs with NCCL 2.28.9."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))


@pytest.fixture
def python_of(tmp_path):
    """Returns a function that makes a Python whose NCCL has the given version."""

    def make(version):
        path = tmp_path / f"python-{version}"
        path.write_text(f"#!/bin/sh\necho a warning\necho {version}\n")
        path.chmod(0o755)
        return f"rollout.servers.python={path}"

    return make


def nccl_problem_of(*overrides):
    return nccl_problem(load_config(PRESET, ["rollout.servers.sync=distributed", *overrides]))


def test_servers_that_are_started_must_have_the_trainers_nccl(tmp_path, cuda, python_of):
    other = python_of("2.30.7")
    assert nccl_problem_of(other) == (
        f"rollout.servers.python = {tmp_path}/python-2.30.7: the servers' NCCL is 2.30.7, the trainer's is 2.28.9; "
        "both must be the same version with rollout.servers.sync = distributed (docs/gpu.md says how), or use "
        "rollout.servers.sync = disk"
    )
    assert nccl_problem_of(python_of("2.28.9")) is None
    assert nccl_problem_of(other, "rollout.servers.sync=disk") is None
    assert nccl_problem_of(other, "rollout.engine=embedded") is None


def test_a_python_without_nccl_is_named(cuda, monkeypatch):
    found = nccl_problem_of("rollout.servers.python=/nowhere/python")
    assert found.startswith("rollout.servers.python = /nowhere/python: its NCCL must be 2.28.9, and cannot be asked: ")
    assert "No such file or directory" in found
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (1, 0, 0))
    found = nccl_problem_of(f"rollout.servers.python={sys.executable}")
    if torch.version.cuda is None:
        assert "must be 1.0.0, and cannot be asked" in found
        assert "_nccl_version" in found
    else:  # a CUDA build tells its NCCL without a GPU
        assert "the trainer's is 1.0.0" in found


def test_the_nccl_of_other_servers_must_be_given(cuda):
    """SGLang does not report it."""
    urls = "rollout.servers.urls=[http://127.0.0.1:9]"
    found = nccl_problem_of(urls)
    assert found.startswith("rollout.servers.nccl_version = None: must be given with rollout.servers.urls")
    assert "it must be the trainer's, 2.28.9" in found
    found = nccl_problem_of(urls, "rollout.servers.nccl_version=2.30.7")
    assert "the servers' NCCL is 2.30.7, the trainer's is 2.28.9" in found
    assert nccl_problem_of(urls, "rollout.servers.nccl_version=2.28.9") is None
    with pytest.raises(ConfigError, match=r"nccl_version = 2.28.9: must be null without rollout.servers.urls"):
        nccl_problem_of("rollout.servers.nccl_version=2.28.9")


def test_without_cuda_nothing_is_asked():
    assert nccl_problem_of("rollout.servers.python=/nowhere/python") is None
