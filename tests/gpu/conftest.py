"""Everything here needs CUDA: without it the tests are collected and skipped. ``make gpu-check`` runs them."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = "cuda"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
            # What other versions of torch, Megatron-Core and Transformer Engine warn of is no failure here.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device():
    """The first GPU, in the precision that the bounds here assume: float32 products without TF32."""
    # One process needs no network but the loopback, which machines in a sandbox may not offer on their own.
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    torch.set_float32_matmul_precision("highest")
    return torch.device(DEVICE, 0)
