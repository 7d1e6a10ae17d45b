"""The group of trainer and servers beside a default group of NCCL that is bound to its GPU."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fipo_megatron.rollout.weight_sync import distributed_sender
from tests.gpu.actors import one_rank


def test_a_group_beside_the_default_group_broadcasts_without_a_split(device, monkeypatch):
    layout = one_rank()
    assert dist.group.WORLD.bound_device_id == layout.device
    asked, source = [], distributed_c10d._get_split_source
    monkeypatch.setattr(distributed_c10d, "_get_split_source", lambda group: asked.append(group) or source(group))
    port, timeout = distributed_sender._free_port(), timedelta(seconds=60)
    group = distributed_sender._join_group("nccl", "127.0.0.1", port, 1, "beside", timeout)
    values = torch.arange(1000.0, device=device)
    group.broadcast(values, 0).wait()
    dist.all_reduce(values)
    torch.cuda.synchronize()
    assert asked == []
    assert torch.equal(values.cpu(), torch.arange(1000.0))
    dist.destroy_process_group(group)
