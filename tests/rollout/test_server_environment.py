"""A server inherits neither the launcher's job, nor the trainer's settings, nor a proxy."""

import asyncio
import json
import sys

import pytest

from fipo_megatron.config import Config, ModelConfig, RolloutConfig, ServersConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, local_servers
from fipo_megatron.rollout.sglang.gpu_placement import ServerGpus
from fipo_megatron.rollout.sglang.server import CPU_SUPPORT

LAUNCHER = dict.fromkeys(
    [
        *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
        *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"),
    ],
    "1",
)
TRAINER = dict.fromkeys(
    [
        *("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES"),
        *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NVTE_FLASH_ATTN", "FIPO_SGLANG_API_KEY"),
    ],
    "1",
)
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
KEPT = {
    "HOME": "/home/user",
    "HF_HOME": "/models",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
    "NCCL_SOCKET_IFNAME": "ib0",
}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Returns a function that starts a stand-in for a server and returns the environment of its process."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, os\n"
        f"json.dump(dict(os.environ), open({str(tmp_path / 'environment.json')!r}, 'w'))\n"
    )
    program.chmod(0o755)
    for name, value in (LAUNCHER | TRAINER | PROXIES | KEPT).items():
        monkeypatch.setenv(name, value)

    def start(environment=None, gpus=None):
        servers = ServersConfig(python=str(program), environment=environment or {})
        config = Config(model=ModelConfig(str(tmp_path)), rollout=RolloutConfig(servers=servers))
        host = HostInfo(0, 0, (0,), cuda=gpus is not None, directory=tmp_path, gpus=gpus)
        [server] = local_servers(config, host)
        with pytest.raises(EngineError, match="ended while it started"):
            asyncio.run(server.start())
        return json.loads((tmp_path / "environment.json").read_text())

    return start


def test_job_settings_and_proxies_stay_with_the_trainer(started):
    found = started()
    assert not {*LAUNCHER, *TRAINER, *PROXIES} & {*found} - {"PYTHONPATH"}
    assert found["PYTHONPATH"] == str(CPU_SUPPORT)
    assert {name: found.get(name) for name in KEPT} == KEPT
    assert found["HF_HUB_OFFLINE"] == "1"


def test_variables_for_servers_are_set_by_the_configuration(started):
    given = {"OMP_NUM_THREADS": "4", "HF_HOME": "/other", "PYTHONPATH": "/plugins", "HF_HUB_OFFLINE": "0"}
    found = started(given)
    assert found["PYTHONPATH"] == f"{CPU_SUPPORT}:/plugins"
    assert {name: found[name] for name in given if name != "PYTHONPATH"} == {
        name: value for name, value in given.items() if name != "PYTHONPATH"
    }


def test_visible_gpus_are_those_of_the_placement(started):
    assert started(gpus=ServerGpus((4,), "0,1,2,3,4,5,6,7"))["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert "CUDA_VISIBLE_DEVICES" not in started(gpus=ServerGpus((4,)))
