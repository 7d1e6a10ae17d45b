"""The size of a checkpoint on disk."""

from __future__ import annotations

import math

import torch

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

_OPTIMIZER_BYTES = 12
"""Bytes of optimizer state per parameter: main parameter and two moments in float32."""


def checkpoint_bytes(architecture: Architecture, dtype: str) -> int:
    """Returns the approximate size of a checkpoint in bytes.

    Args:
        architecture: Architecture of the model.
        dtype: Dtype of the weights, ``actor.dtype``.
    """
    parameters = sum(math.prod(shape) for shape in tables.hf_tensors(architecture).values())
    return parameters * (int(getattr(torch, dtype).itemsize) + _OPTIMIZER_BYTES)
