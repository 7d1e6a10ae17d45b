"""The group of the trainer and the servers is formed beside the default group, never by splitting it."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fipo_megatron.rollout.weight_sync import distributed_sender


@pytest.fixture
def default_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_no_split_of_a_bound_default_group_is_asked_for(default_group, monkeypatch):
    """A split is a collective of all trainer ranks: the ranks that send nothing would never join, and it would hang."""
    asked = []
    monkeypatch.setattr(distributed_c10d, "_get_split_source", lambda group: asked.append(group))
    device = torch.device("cpu", 0)
    default_group.bound_device_id = device
    port, timeout = distributed_sender._free_port(), timedelta(seconds=20)
    group = distributed_sender._join_group("gloo", "127.0.0.1", port, 1, "beside", timeout)
    assert asked == []
    assert default_group.bound_device_id == device
    values = torch.arange(3.0)
    group.broadcast(values, 0).wait()
    assert values.tolist() == [0, 1, 2]
