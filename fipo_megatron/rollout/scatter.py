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
from fipo_megatron.rollout.group_buffers import GroupBytes, read_groups


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
    mine, index = list(groups), {name: number for number, name in enumerate(names)}
    found: dict[int, Trajectory] = {}
    for mini_batch in plan:  # one after the other: buffers are sent of one at a time
        trains = {number: data for data, micros in enumerate(mini_batch.micro_batches) for m in micros for number in m}
        shares: list[list[Group]] = [[] for _ in routes.leaders]
        for group in mine:
            for data, part in _by_destination(group, index, trains).items():
                shares[data].append(part)
        for group in _exchange(routes, shares):
            found |= {index[trajectory.name]: trajectory for trajectory in group.trajectories}
    return found


def _exchange(routes: Routes, shares: Sequence[Sequence[Group]]) -> list[Group]:
    """Sends share n to data-parallel rank n; returns the groups for this rank. A collective of all ranks."""
    alone = dist.get_world_size(routes.replica) == 1
    kept: Sequence[Group] = ()
    if alone:  # what stays on this rank need not be copied
        kept = shares[routes.data_rank]
        shares = [() if data == routes.data_rank else share for data, share in enumerate(shares)]
    received = torch.empty(0, dtype=torch.uint8)
    sizes: list[int] = []
    if routes.among_leaders is not None and not (alone and len(shares) == 1):
        received, sizes = _all_to_all([GroupBytes.of(share) for share in shares], routes.among_leaders)
    if not alone:
        received, sizes = _broadcast(received, sizes, routes.leaders[routes.data_rank], routes.replica)
    parts = np.split(received.numpy(), np.cumsum(sizes)[:-1]) if sizes else []
    return [*kept, *(group for part in parts for group in read_groups(part))]


def _by_destination(group: Group, index: Mapping[str, int], trains: Mapping[int, int]) -> dict[int, Group]:
    parts: dict[int, list[Trajectory]] = {}
    for trajectory in group.trajectories:
        if (data := trains.get(index[trajectory.name])) is not None:
            parts.setdefault(data, []).append(trajectory)
    return {data: replace(group, trajectories=tuple(found)) for data, found in parts.items()}


def _all_to_all(parts: Sequence[GroupBytes], group: dist.ProcessGroup) -> tuple[Tensor, list[int]]:
    """Sends part n to rank n of the group; returns the parts received from each rank, joined, and their sizes."""
    sizes = torch.tensor([part.size for part in parts])
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes, group=group)
    outgoing = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    for part, buffer in zip(parts, torch.split(outgoing, sizes.tolist()), strict=True):
        part.write(buffer.numpy())
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, outgoing, incoming.tolist(), sizes.tolist(), group=group)
    return received, incoming.tolist()


def _broadcast(
    content: Tensor, sizes: Sequence[int], source: int, group: dist.ProcessGroup
) -> tuple[Tensor, list[int]]:
    """Returns the bytes, and the sizes of their parts, that the first rank of the group has."""
    mine = dist.get_rank() == source
    count = torch.tensor([len(sizes)])
    dist.broadcast(count, source, group=group)
    parts = torch.tensor(sizes) if mine else torch.empty(int(count), dtype=torch.int64)
    dist.broadcast(parts, source, group=group)
    if not mine:
        content = torch.empty(int(parts.sum()), dtype=torch.uint8)
    dist.broadcast(content, source, group=group)
    return content, parts.tolist()
