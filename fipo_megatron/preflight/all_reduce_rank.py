"""One process of the all-reduce measurement; :mod:`.all_reduce` starts it.

python -m fipo_megatron.preflight.all_reduce_rank PLAN NODE LOCAL_RANK
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from fipo_megatron.preflight.all_reduce import AllReducePlan
from fipo_megatron.preflight.node_facts import AllReduceFacts

_CUDA_BYTES, _CPU_BYTES = 2**28, 2**22
_ROUNDS = 5


def main(arguments: Sequence[str]) -> int:
    """Measures and prints what is known so far as JSON, once or twice; returns the exit code."""
    plan, node, local = AllReducePlan.from_json(arguments[0]), int(arguments[1]), int(arguments[2])
    if plan.cuda:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if plan.cuda else torch.device("cpu")
    limit = timedelta(seconds=plan.seconds)
    store = dist.TCPStore(plan.host, plan.port, is_master=False, timeout=limit)
    dist.init_process_group(
        "nccl" if plan.cuda else "gloo",
        store=dist.PrefixStore("all_reduce", store),
        rank=plan.first_rank(node) + local,
        world_size=plan.world_size,
        timeout=limit,
        device_id=device if plan.cuda else None,
    )
    data = torch.zeros((_CUDA_BYTES if plan.cuda else _CPU_BYTES) // 4, device=device)
    everywhere = _bandwidth(data, dist.group.WORLD)
    _print(AllReduceFacts(everywhere))
    if everywhere < plan.minimum:  # the same value on all ranks, hence the same decision
        _print(AllReduceFacts(everywhere, *_parts(data, plan, node)))
    dist.destroy_process_group()
    return 0


def _print(facts: AllReduceFacts) -> None:
    print(facts.to_json().decode(), flush=True)


def _parts(data: torch.Tensor, plan: AllReducePlan, node: int) -> tuple[float | None, dict[int, float]]:
    """Measures every node alone, and every node together with the next one if there are more than two.

    All processes create all groups in the same order, as torch requires.
    """
    own: float | None = None
    pairs: dict[int, float] = {}
    for one, count in plan.processes.items():
        group = _group(plan, (one,))
        if one == node and count > 1:
            own = _bandwidth(data, group)
    nodes = list(plan.processes)
    if len(nodes) == 2:
        return own, pairs
    ring = [(pair, _group(plan, pair)) for pair in pairwise([*nodes, nodes[0]])]
    for neighbours in (ring[0::2], ring[1::2]):  # no node is in two pairs of a half at the same time
        for (one, other), group in neighbours:
            if node in (one, other):
                pairs[other if node == one else one] = _bandwidth(data, group)
        dist.barrier()
    return own, pairs


def _group(plan: AllReducePlan, nodes: Sequence[int]) -> dist.ProcessGroup:
    ranks = [plan.first_rank(node) + local for node in nodes for local in range(plan.processes[node])]
    group: dist.ProcessGroup = dist.new_group(sorted(ranks))
    return group


def _bandwidth(data: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Returns the bus bandwidth of an all-reduce in GB/s, that of the slowest process.

    Every process sends and receives 2 (n − 1) / n of the data in the best algorithms.
    """
    dist.all_reduce(data, group=group)  # makes the connections
    dist.all_reduce(data, group=group)
    _synchronize(data)
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(data, group=group)
    _synchronize(data)
    seconds = torch.tensor((time.perf_counter() - start) / _ROUNDS, device=data.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    processes = dist.get_world_size(group)
    return 2 * (processes - 1) / processes * data.nbytes / seconds.item() / 1e9


def _synchronize(data: torch.Tensor) -> None:
    if data.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
