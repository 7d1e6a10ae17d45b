"""Servers take the GPUs that the configuration gives them, and never those of the trainer's ranks unless colocated."""

from pathlib import Path

import pytest

from fipo_megatron.config import Config, ModelConfig, RolloutConfig, ServersConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, local_servers
from fipo_megatron.rollout.sglang.gpu_placement import RankGpu, ServerGpus, place_servers


def rollout_of(sglang=None, **servers):
    sync = {"sync": "disk"} if servers.get("colocated") else {}
    return RolloutConfig(sglang=sglang or {}, servers=ServersConfig(**(sync | servers)))


def torchrun(ranks, gpus=8, visible=None):
    """Ranks that see all GPUs of the host."""
    return [RankGpu(index, gpus, visible) for index in range(ranks)]


def per_task(*names):
    """Ranks that see one GPU each, as Slurm may start them."""
    return [RankGpu(0, 1, name) for name in names]


@pytest.mark.parametrize(
    ("ranks", "rollout", "expected"),
    [
        (torchrun(4), rollout_of({"tp_size": 4}), ServerGpus((4,))),
        (torchrun(4), rollout_of({"tp_size": 2}, per_host=2), ServerGpus((4, 6))),
        (torchrun(2), rollout_of({"tp_size": 2, "base_gpu_id": 4}, per_host=2), ServerGpus((4, 6))),
        (torchrun(4), rollout_of({"base_gpu_id": 4, "tp_size": 2, "gpu_id_step": 2}), ServerGpus((4,))),
        (torchrun(8), rollout_of({"tp_size": 4}, per_host=2, colocated=True), ServerGpus((0, 4))),
        (torchrun(8), rollout_of({"base_gpu_id": 4}, colocated=True), ServerGpus((4,))),
        (torchrun(2, 4, "4,5,6,7"), rollout_of({"tp_size": 2}), ServerGpus((2,), "4,5,6,7")),
        (per_task("0", "1"), rollout_of(), ServerGpus((2,))),
        (per_task("2", "3"), rollout_of({"base_gpu_id": 0, "tp_size": 2}), ServerGpus((0,))),
        (per_task("0", "1"), rollout_of({"tp_size": 2}, colocated=True), ServerGpus((0,), "0,1")),
        (per_task("GPU-a", "GPU-b"), rollout_of({"tp_size": 2}, colocated=True), ServerGpus((0,), "GPU-a,GPU-b")),
        (
            torchrun(4),
            rollout_of({"tp_size": 2}, environment={"CUDA_VISIBLE_DEVICES": "6,7"}),
            ServerGpus((0,), "6,7"),
        ),
        ([], rollout_of({"tp_size": 4}, per_host=2), ServerGpus((0, 4))),
    ],
)
def test_gpus_of_servers(ranks, rollout, expected):
    assert place_servers(rollout, ranks) == expected


@pytest.mark.parametrize(
    ("ranks", "rollout", "texts"),
    [
        (
            torchrun(8),
            rollout_of({"tp_size": 4}),
            [
                "rollout.sglang.base_gpu_id = 8 (default): rollout.servers.per_host = 1 with "
                "rollout.sglang.tp_size = 4 needs the GPUs 8-11; servers see 0-7, of which the trainer's ranks use 0-7",
                "fewer ranks per host",
                "rollout.servers.colocated = true",
            ],
        ),
        (
            torchrun(4),
            rollout_of({"tp_size": 4, "base_gpu_id": 2}),
            ["needs the GPUs 2-5, but the trainer's ranks use 0-3: 2-3 would be shared"],
        ),
        (torchrun(4), rollout_of({"tp_size": 4}, per_host=2), ["needs the GPUs 4-11; servers see 0-7"]),
        (torchrun(8), rollout_of({"tp_size": 8}, per_host=2, colocated=True), ["needs the GPUs 0-15; servers see 0-7"]),
        (
            torchrun(2, 2, "4,5"),
            rollout_of(),
            ["needs the GPUs 2; servers see 0-1, of which the trainer's ranks use 0-1"],
        ),
        (
            torchrun(4),
            rollout_of({"base_gpu_id": 0, "tp_size": 2}, environment={"CUDA_VISIBLE_DEVICES": "3,4"}),
            ["needs the GPUs 0-1, but the trainer's ranks use 0: 0 would be shared"],
        ),
        (per_task("0", "1"), rollout_of({"base_gpu_id": 1}), ["the trainer's ranks use 0-1: 1 would be shared"]),
        (
            per_task("GPU-a", "GPU-b"),
            rollout_of(),
            ["environment.CUDA_VISIBLE_DEVICES: not set, and the trainer's ranks use GPU-a, GPU-b"],
        ),
        (
            torchrun(1),
            rollout_of({"base_gpu_id": -1}),
            ["rollout.sglang.base_gpu_id = -1: must be a whole number of at"],
        ),
        (
            torchrun(1),
            rollout_of({"tp_size": "2"}),
            ["rollout.sglang.tp_size = '2': must be a whole number of at least 1"],
        ),
    ],
)
def test_refused(ranks, rollout, texts):
    with pytest.raises(EngineError) as raised:
        place_servers(rollout, ranks)
    for text in texts:
        assert text in str(raised.value)


def test_servers_are_started_with_the_gpus_of_the_configuration():
    rollout = rollout_of({"base_gpu_id": 4, "tp_size": 2}, per_host=2)
    host = HostInfo(0, 0, (0,), cuda=True, directory=Path("/nowhere"), gpus=place_servers(rollout, torchrun(4)))
    servers = local_servers(Config(model=ModelConfig("/nowhere"), rollout=rollout), host)
    assert [server.spec.arguments["base_gpu_id"] for server in servers] == [4, 6]
