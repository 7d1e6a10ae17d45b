"""Scatters trajectories from the leaders that sampled them to the ranks that train on them, and to no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Group, Trajectory
from fipo_megatron.rollout.carry_over import deserialize_groups, serialize_groups


@dataclass(frozen=True)
class Routes:
    """Process groups in host memory (gloo) over which trajectories are scattered.

    Attributes:
        data_rank: Data-parallel rank of this rank.
        leaders: First global rank of each data-parallel rank.
        among_leaders: Process group of the leaders; None on other ranks.
        replica: Process group of the ranks that train on the same responses: tensor-, context- and pipeline-parallel
            peers.
    """

    data_rank: int
    leaders: tuple[int, ...]
    among_leaders: dist.ProcessGroup | None
    replica: dist.ProcessGroup

    @classmethod
    def build(cls, data_rank: int, timeout: timedelta = timedelta(minutes=30)) -> Routes:
        """Creates the process groups; a collective of all ranks.

        Args:
            data_rank: Data-parallel rank of this rank.
            timeout: Limit of one collective in these groups.
        """
        everyone: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, data_rank)
        replicas = [[r for r, at in enumerate(everyone) if at == data] for data in range(max(everyone) + 1)]
        leaders = tuple(ranks[0] for ranks in replicas)
        among = dist.new_group(leaders, timeout=timeout, backend="gloo")
        groups = [dist.new_group(ranks, timeout=timeout, backend="gloo") for ranks in replicas]
        return cls(data_rank, leaders, among if dist.get_rank() in leaders else None, groups[data_rank])


def scatter_trajectories(
    routes: Routes, groups: Iterable[Group], names: Sequence[str], plan: Sequence[MiniBatch]
) -> dict[int, Trajectory]:
    """Scatters the trajectories of a step; a collective of all ranks.

    Args:
        routes: Process groups of this rank.
        groups: Groups of the step that this rank has sampled.
        names: ``Trajectory.name`` of all trajectories of the step, in the order of their indices.
        plan: Mini-batches of the step; their micro-batches hold indices of trajectories by data-parallel rank.

    Returns:
        The trajectories that this rank trains on, by index.
    """
    index = {name: number for number, name in enumerate(names)}
    trains = {
        number: data for mini in plan for data, micros in enumerate(mini.micro_batches) for m in micros for number in m
    }
    content = b""
    if routes.among_leaders is not None:
        shares: list[list[Group]] = [[] for _ in routes.leaders]
        for group in groups:
            for data, part in _by_destination(group, index, trains).items():
                shares[data].append(part)
        received = _all_to_all([serialize_groups(share) for share in shares], routes.among_leaders)
        content = serialize_groups(group for part in received for group in deserialize_groups(part)[0])
    content = _broadcast(content, routes.leaders[routes.data_rank], routes.replica)
    return {index[t.name]: t for group in deserialize_groups(content)[0] for t in group.trajectories}


def _by_destination(group: Group, index: Mapping[str, int], trains: Mapping[int, int]) -> dict[int, Group]:
    parts: dict[int, list[Trajectory]] = {}
    for trajectory in group.trajectories:
        parts.setdefault(trains[index[trajectory.name]], []).append(trajectory)
    return {data: replace(group, trajectories=tuple(found)) for data, found in parts.items()}


def _all_to_all(parts: Sequence[bytes], group: dist.ProcessGroup) -> list[bytes]:
    """Sends part n to rank n of the group; returns the part received from each rank."""
    if len(parts) == 1:
        return list(parts)
    sizes = torch.tensor([len(part) for part in parts])
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes, group=group)
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, _tensor(b"".join(parts)), incoming.tolist(), sizes.tolist(), group=group)
    return [part.numpy().tobytes() for part in torch.split(received, incoming.tolist())]


def _broadcast(content: bytes, source: int, group: dist.ProcessGroup) -> bytes:
    if dist.get_world_size(group) == 1:
        return content
    size = torch.tensor([len(content)])
    dist.broadcast(size, source, group=group)
    data = _tensor(content) if dist.get_rank() == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return data.numpy().tobytes()


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8))
