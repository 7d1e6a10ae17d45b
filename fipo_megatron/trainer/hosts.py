"""Checks the hosts of a run before anything is built: their addresses and the GPUs of servers."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.config import Config
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo
from fipo_megatron.rollout.host_address import LOOPBACK, host_address, is_asked_for
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, RankGpu, ServerGpus, place_servers


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


def describe_host(config: Config, layout: RankLayout) -> HostInfo:
    """Returns this rank's host, and checks addresses and GPUs. A collective of all ranks.

    Raises:
        EngineError: Other hosts cannot reach this one, or the servers to start have no GPUs of their own; on all ranks.
    """
    own = _own_place(config, layout)
    everyone: list[RankPlace] = [own] * layout.world_size
    dist.all_gather_object(everyone, own)
    starters = tuple(rank for rank, place in enumerate(everyone) if place.local_rank == 0)
    placement = _server_gpus(config, everyone)
    directory = Path(config.run.output) / "rollout"
    directory.mkdir(exist_ok=True)
    return HostInfo(
        rank=layout.rank,
        local_rank=own.local_rank,
        starters=starters,
        cuda=layout.device.type == "cuda",
        directory=directory,
        address=_address(config, own, everyone, hosts=len(starters)),
        gpus=placement.get(own.host),
    )


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
    if config.rollout.engine != "sglang" or not is_asked_for(config.rollout.servers, hosts):
        return LOOPBACK
    for place in everyone:
        if place.problem:
            raise EngineError(f"host {place.host}: {place.problem}")
    return own.address
