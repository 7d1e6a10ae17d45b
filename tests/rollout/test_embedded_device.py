"""The device of the embedded engine: one that is missing is told before the start. tests/gpu uses one that is there."""

import pytest
import torch

from fipo_megatron.config import Config, RolloutConfig
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import embedded_settings


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
