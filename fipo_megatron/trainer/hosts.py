"""Checks the hosts of a run before anything is built: their addresses, the GPUs of servers, and running servers."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.collectives import broadcast_from_first_rank
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.config import Config
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, check_running_servers
from fipo_megatron.rollout.host_address import LOOPBACK, all_local, host_address
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, RankGpu, ServerGpus, place_servers
from fipo_megatron.trainer.training_inputs import TrainingInputs


@dataclass(frozen=True)
class RankPlace:
    """The place of a rank.

    Attributes:
        host: Name of its host.
        local_rank: Rank on its host.
        gpu: Its GPU; None on CPU.
        address: Address of its host for other hosts; empty if there is none.
        problem: Why there is no address.
    """

    host: str
    local_rank: int
    gpu: RankGpu | None
    address: str = LOOPBACK
    problem: str = ""


def describe_host(config: Config, inputs: TrainingInputs, layout: RankLayout) -> HostInfo:
    """Returns this rank's host, and checks addresses, GPUs and running servers. A collective of all ranks.

    Raises:
        EngineError: Other hosts cannot reach this one, the servers to start have no GPUs of their own, or running
            servers do not serve the model; on all ranks.
    """
    own = _own_place(config, layout)
    everyone: list[RankPlace] = [own] * layout.world_size
    dist.all_gather_object(everyone, own)
    starters = tuple(rank for rank, place in enumerate(everyone) if place.local_rank == 0)
    placement = _server_gpus(config, everyone)
    directory = Path(config.run.output) / "rollout"
    directory.mkdir(exist_ok=True)
    host = HostInfo(
        rank=layout.rank,
        local_rank=own.local_rank,
        starters=starters,
        cuda=layout.device.type == "cuda",
        directory=directory,
        address=_address(config, own, everyone, hosts=len(starters)),
        gpus=placement.get(own.host),
    )
    if config.rollout.engine == "sglang" and config.rollout.servers.urls:
        _check_running_servers(config, inputs, layout)
    return host


def _own_place(config: Config, layout: RankLayout) -> RankPlace:
    address, problem = LOOPBACK, ""
    if config.rollout.engine == "sglang":
        try:
            address = host_address(config.rollout.servers.interface)
        except EngineError as error:
            address, problem = "", str(error)
    local_rank = parallel.Launch.from_environment(os.environ).local_rank
    return RankPlace(socket.gethostname(), local_rank, rank_gpu(layout.device), address, problem)


def rank_gpu(device: torch.device) -> RankGpu | None:
    """Returns the GPU of this rank; None on CPU."""
    if device.type != "cuda":
        return None
    return RankGpu(device.index, torch.cuda.device_count(), os.environ.get(VISIBLE))


def _server_gpus(config: Config, everyone: list[RankPlace]) -> dict[str, ServerGpus]:
    """Returns the GPUs of the servers of each host; empty on CPU and without servers to start."""
    if config.rollout.engine != "sglang" or config.rollout.servers.urls:
        return {}
    gpus: dict[str, list[RankGpu]] = {}
    for place in everyone:
        if place.gpu is not None:
            gpus.setdefault(place.host, []).append(place.gpu)
    found = {}
    for host, ranks in gpus.items():
        try:
            found[host] = place_servers(config.rollout, ranks)
        except EngineError as error:
            raise EngineError(f"host {host}: {error}") from None
    return found


def _address(config: Config, own: RankPlace, everyone: list[RankPlace], hosts: int) -> str:
    """Returns the address of this host: a loopback address if nothing outside of it takes part."""
    servers = config.rollout.servers
    if config.rollout.engine != "sglang":
        return LOOPBACK
    distant = not all_local(servers.urls) and servers.sync == "distributed" if servers.urls else hosts > 1
    if not distant and servers.interface is None:
        return LOOPBACK
    for place in everyone:
        if place.problem:
            raise EngineError(f"host {place.host}: {place.problem}")
    return own.address


def _check_running_servers(config: Config, inputs: TrainingInputs, layout: RankLayout) -> None:
    problem = ""
    if layout.rank == 0:
        try:
            asyncio.run(check_running_servers(config, inputs.tokenizer, inputs.architecture.vocab))
        except EngineError as error:
            problem = str(error)
    if problem := broadcast_from_first_rank(problem, layout.device):
        raise EngineError(problem)
