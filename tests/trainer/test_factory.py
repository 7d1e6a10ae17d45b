"""A trainer that cannot be opened leaves nothing open: no process group, thread, process or signal handler."""

import os
import signal
import socket
import threading

import pytest
import torch.distributed as dist

from examples.quickstart import task
from fipo_megatron.config import load_config
from fipo_megatron.data.tokenizer import load_tokenizer
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.gpu_placement import RankGpu
from fipo_megatron.storage.output_lock import OutputInUseError, lock_output
from fipo_megatron.trainer import factory, hosts
from fipo_megatron.trainer.factory import open_trainer
from fipo_megatron.trainer.training_inputs import read_training_inputs
from fipo_megatron.weights.hf_directory import WeightsError
from tests.rollout.stub_servers import stub_servers
from tests.runs import command

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    return directory


def open_(data, output, *overrides):
    words = command(data, output, *overrides)
    start = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    config = load_config(words[start], words[start + 1 :])
    return open_trainer(config, read_training_inputs(config))


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


def names_of_threads():
    return {thread.name.split("_")[0] for thread in threading.enumerate()} & {"checkpoint", "rollout"}


def test_open_trainer_closes_with_its_block(data, tmp_path):
    before = handlers()
    with open_(data, tmp_path / "run") as trainer:
        assert dist.is_initialized()
        assert names_of_threads() == {"rollout"}
        assert handlers() != before
        assert trainer.step == 0
    assert not dist.is_initialized()
    assert not names_of_threads()
    assert handlers() == before


def test_damaged_checkpoint_on_resume_closes_what_was_opened(data, tmp_path):
    before = handlers()
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(WeightsError, match="none of 1 checkpoints is whole"):
        open_(data, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-000002-0").is_dir()
    assert not dist.is_initialized()
    assert not names_of_threads()
    assert handlers() == before


def test_output_of_a_running_run_is_refused_before_anything_is_opened(data, tmp_path):
    before = handlers()
    with lock_output(tmp_path / "run"), pytest.raises(OutputInUseError, match=f"process {os.getpid()} on"):
        open_(data, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert not dist.is_initialized()
    assert not names_of_threads()
    assert handlers() == before
    with open_(data, tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.fixture
def nothing_built(monkeypatch):
    """Fails if a model is built."""
    monkeypatch.setattr(factory, "_build", lambda *arguments: pytest.fail("a model was built"))


BY_SERVERS = ["rollout.engine=sglang", "rollout.servers.python=/nowhere"]


@pytest.mark.usefixtures("nothing_built")
def test_running_servers_are_compared_before_the_model_is_built(data, tmp_path):
    with (
        stub_servers(load_tokenizer(data / "model"), {"dp_size": 2}) as [server],
        pytest.raises(EngineError, match="dp_size = 2, must be 1"),
    ):
        open_(data, tmp_path / "run", *BY_SERVERS, f"rollout.servers.urls=[{server.url}]")
    assert not dist.is_initialized()


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["rollout.servers.urls=[http://10.9.8.7:1]"],
            "host localhost: .* name localhost resolves to 127.0.0.1, which",
        ),
        (["rollout.servers.interface=nosuch0"], "rollout.servers.interface = nosuch0: is neither a network interface"),
    ],
)
def test_an_address_that_servers_cannot_reach_is_refused_before_the_model_is_built(
    overrides, text, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(EngineError, match=text):
        open_(data, tmp_path / "run", *BY_SERVERS, *overrides)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("nothing_built")
def test_servers_on_the_gpus_of_the_trainer_are_refused_before_the_model_is_built(data, tmp_path, monkeypatch):
    """The GPUs are stand-ins: this rank reports one, as it would on CUDA."""
    monkeypatch.setattr(hosts, "rank_gpu", lambda device: RankGpu(0, 8))
    with pytest.raises(EngineError, match="needs the GPUs 0-3, but the trainer's ranks use 0: 0 would be shared"):
        open_(data, tmp_path / "run", *BY_SERVERS, "rollout.sglang={tp_size: 4, base_gpu_id: 0}")
    assert not dist.is_initialized()


def test_servers_that_do_not_answer_close_what_was_opened(data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EngineError, match="cannot be reached"):
        open_(data, tmp_path / "run", "rollout.engine=sglang", f"rollout.servers.urls=[http://127.0.0.1:{port}]")
    assert not dist.is_initialized()
    assert not names_of_threads()
