"""Servers that cannot be used are refused before Megatron is imported, which takes seconds."""

import os
import subprocess

import pytest
import torch

from fipo_megatron.actor.launch import ranks_on_host
from fipo_megatron.config import load_config
from fipo_megatron.data.tokenizer import InputError, load_tokenizer
from fipo_megatron.trainer import server_inputs
from fipo_megatron.trainer.training_inputs import read_training_inputs
from tests.processes import ROOT
from tests.rollout.stub_servers import stub_servers
from tests.runs import arguments, command

BY_SERVERS = ["rollout.engine=sglang", "rollout.servers.sync=disk"]
ON_THE_TRAINERS_GPUS = [*BY_SERVERS, "rollout.servers.python=/nowhere", "rollout.sglang={tp_size: 4, base_gpu_id: 0}"]
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

# torch.cuda of a host with eight GPUs, as soon as torch is imported.
EIGHT_GPUS = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def stand_in(module):
            execute(module)
            module.cuda.is_available, module.cuda.device_count = lambda: True, lambda: 8
        spec.loader.exec_module = stand_in
        return spec

sys.meta_path.insert(0, Finder())
"""


def refused(data, output, *overrides, code, path=""):
    """Starts a run that fails; returns what it printed and the modules that it imported."""
    done = subprocess.run(
        command(data, output, *overrides),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{path}:{ROOT}", "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == code, said
    return said, {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.processes
def test_servers_that_take_no_weights_are_refused_without_megatron(data, tmp_path):
    with stub_servers(load_tokenizer(data / "model"), {"dp_size": 2, "pp_size": 4}) as [server]:
        urls = f"rollout.servers.urls=[{server.url}]"
        said, modules = refused(data, tmp_path / "run", *BY_SERVERS, urls, code=1)
    assert f"{server.url}: dp_size = 2, must be 1: weights cannot be sent to data-parallel servers" in said
    assert f"{server.url}: pp_size = 4, must be 1: weights cannot be sent to pipeline-parallel servers" in said
    assert "Traceback" not in said
    assert "torch" in modules
    assert not {name for name in modules if name.partition(".")[0] == "megatron"}
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_servers_on_the_gpus_of_the_trainer_are_refused_without_megatron(data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(EIGHT_GPUS)
    said, modules = refused(data, tmp_path / "run", *ON_THE_TRAINERS_GPUS, code=2, path=tmp_path)
    assert "needs the GPUs 0-3, but the trainer's ranks use 0: 0 would be shared" in said
    assert "torch" in modules
    assert not {name for name in modules if name.partition(".")[0] == "megatron"}


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def set_environment(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("eight_gpus")
def test_the_ranks_of_torchrun_take_the_first_gpus(data, tmp_path, monkeypatch):
    words = arguments(data, tmp_path / "run", *ON_THE_TRAINERS_GPUS)
    config = load_config(words[0], words[1:])
    set_environment(monkeypatch, TORCHRUN | {"LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(InputError, match=r"needs the GPUs 0-3, but the trainer's ranks use 0-1: 0-1 would be shared"):
        read_training_inputs(config)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match=r"needs the GPUs 0-3, but the trainer's ranks use 0-1: 0-1 would be shared"):
        read_training_inputs(config)


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (TORCHRUN, 8),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}, 1),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, 8),
    ],
    ids=["unknown number of ranks", "a GPU for each rank", "srun"],
)
def test_what_a_rank_alone_cannot_know_is_left_to_all_ranks(environment, gpus, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    set_environment(monkeypatch, environment)
    words = arguments(data, tmp_path / "run", *ON_THE_TRAINERS_GPUS)
    assert server_inputs.gpu_problem(load_config(words[0], words[1:])) is None


def test_servers_with_gpus_of_their_own_and_running_servers_are_no_problem(data, tmp_path, eight_gpus):
    for overrides in (["rollout.sglang={tp_size: 4}"], ["rollout.servers.urls=[http://127.0.0.1:9]"]):
        words = arguments(data, tmp_path / "run", *BY_SERVERS, *overrides)
        assert server_inputs.gpu_problem(load_config(words[0], words[1:])) is None


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "x"}, None),
    ],
)
def test_ranks_on_this_host(environment, ranks):
    assert ranks_on_host(environment) == ranks


def test_only_rank_0_asks_running_servers(data, tmp_path, monkeypatch):
    """Each server answers one rank, not a thousand."""
    tokenizer = load_tokenizer(data / "model")
    set_environment(monkeypatch, TORCHRUN)
    words = arguments(data, tmp_path / "run", *BY_SERVERS, "rollout.servers.urls=[http://127.0.0.1:9]")
    server_inputs.check_running_servers(load_config(words[0], words[1:]), tokenizer, vocab=8)
