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

from fipo_megatron.weights.hf_directory import WeightsError, first_line


def random_state_bytes() -> bytes:
    """Returns the states of all random generators as the content of a file for :func:`read_random_state`."""
    content = io.BytesIO()
    torch.save(_random_state(), content)
    return content.getvalue()


def read_random_state(file: Path) -> Mapping[str, Any]:
    """Reads a file that :func:`random_state_bytes` filled, and tries its states on generators of their own.

    Raises:
        WeightsError: The file is missing or damaged, or holds objects other than tensors, numbers and text.
    """
    try:
        state: Mapping[str, Any] = torch.load(file, weights_only=True)
        torch.Generator().set_state(state["torch"])
        np.random.RandomState().set_state(_numpy_state(state))
        random.Random().setstate(_python_state(state))
        if not all(one.dtype == torch.uint8 for one in (*state["cuda"], *dict(state["tracker"]).values())):
            raise TypeError("expected states of uint8")
    except Exception as error:  # a damaged archive raises errors of any type
        raise WeightsError(f"{file}: is damaged: {first_line(error)}") from error
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Sets all random generators to the states that :func:`read_random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    np.random.set_state(_numpy_state(state))  # noqa: NPY002
    random.setstate(_python_state(state))


def _numpy_state(state: Mapping[str, Any]) -> Any:
    kind, keys, position, has_gauss, gauss = state["numpy"]
    return kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss


def _python_state(state: Mapping[str, Any]) -> Any:
    version, internal, gauss_next = state["python"]
    return version, tuple(internal), gauss_next


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
