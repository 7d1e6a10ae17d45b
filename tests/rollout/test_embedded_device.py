"""The device of the embedded engine: one that is missing is told before the start. tests/gpu uses one that is there."""

import asyncio
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fipo_megatron.config import Config, ModelConfig, RolloutConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, embedded_settings, open_engine
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from tests.actor.models import random_model


def settings(local_rank=0, **changes):
    return embedded_settings(Config(rollout=RolloutConfig(engine="embedded", **changes)), local_rank)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"^rollout\.embedded_device = cuda: torch finds no GPU .*; valid: cpu$"):
        settings(embedded_device="cuda")
    assert settings(embedded_slots=48) == {"slots": 48, "device": "cpu"}


@pytest.mark.parametrize(("visible", "device"), [(8, "cuda:3"), (1, "cuda:0")])
def test_each_rank_has_its_own_gpu(visible, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert settings(3, embedded_device="cuda")["device"] == device


def test_a_rank_without_its_gpu_ends_all_ranks(tmp_path, monkeypatch):
    """The others would wait for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    random_model("qwen2").save_pretrained(tmp_path)
    store = dist.HashStore()

    async def opened(rank, device):
        rollout = RolloutConfig(engine="embedded", embedded_device=device)
        config = Config(model=ModelConfig(str(tmp_path)), rollout=rollout)
        host = HostInfo(rank, rank, (0,), cuda=False, directory=Path(tmp_path))
        coordinator = StoreCoordinator(store, rank, (0, 1), 2, silence_seconds=30)
        return await open_engine(config, host, coordinator, coordinator, tokenizer=None, vocab=61)

    async def both():
        ranks = asyncio.gather(opened(0, "cpu"), opened(1, "cuda"), return_exceptions=True)
        return await asyncio.wait_for(ranks, 30)

    for error in asyncio.run(both()):
        assert isinstance(error, EngineError)
        assert "rollout.embedded_device = cuda: torch finds no GPU" in str(error)
