"""Random generator states of one process: torch, CUDA, Megatron's tracker, NumPy and Python."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state_bytes() -> bytes:
    """Returns the states of all random generators as the content of a file for :func:`restore_random_state`."""
    content = io.BytesIO()
    torch.save(_random_state(), content)
    return content.getvalue()


def restore_random_state(file: Path) -> None:
    """Sets all random generators to the states in a file that :func:`random_state_bytes` filled."""
    state: Mapping[str, Any] = torch.load(file, weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _random_state() -> dict[str, Any]:
    """Returns the states as tensors and lists, which ``torch.load(weights_only=True)`` accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the generator that libraries use
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "tracker": dict(get_cuda_rng_tracker().get_states()),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
