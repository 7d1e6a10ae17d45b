"""Throughput of a step: tokens per second, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Sequence

from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
"""Dense bfloat16 FLOP/s by substring of the device name, first match, from NVIDIA's data sheets."""

FORWARD, TRAINING = 1, 3
"""Work of a forward pass, and of forward and backward: backward is twice the work of forward."""


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of one device; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def matrix_parameters(architecture: Architecture) -> int:
    """Counts the parameters that a token is multiplied with: no input embedding, and only the top-k experts."""
    dense = tables.parameter_count(architecture) - architecture.vocab * architecture.hidden * (not architecture.tied)
    mixture = architecture.mixture
    if mixture is not None:
        idle = mixture.experts - mixture.top_k
        dense -= sum(mixture.layers) * idle * 3 * architecture.hidden * mixture.ffn
    return dense


def model_flops(architecture: Architecture, lengths: Sequence[int]) -> float:
    """Returns the FLOPs of a forward pass over sequences of these lengths: 2 per parameter and token, plus attention.

    Causal attention has ``L² / 2`` pairs of positions, each with two products of ``heads × head_dim`` numbers.
    """
    pairs = sum(length * length / 2 for length in lengths)
    attention = 4 * architecture.layers * architecture.heads * architecture.head_dim * pairs
    return 2.0 * matrix_parameters(architecture) * sum(lengths) + attention


def throughput(
    *,
    generated: float | None,
    generating: float,
    trained: int,
    training: float,
    step: float,
    flops: float,
    peak: float | None,
) -> dict[str, float | None]:
    """Returns the throughput metrics of a step by tag.

    Args:
        generated: Sampled response tokens; None without an engine.
        generating: Seconds of sampling.
        trained: Tokens trained on, prompts included.
        training: Seconds of log-probs and updates.
        step: Seconds of the whole step.
        flops: FLOPs of all passes of the step.
        peak: Peak FLOP/s of all devices together; None if it is not known.
    """
    values = {"throughput/trained_tokens_per_second": trained / training if training else None}
    values["throughput/tokens_per_second"] = trained / step if step else None
    if generated is not None:
        values["throughput/generated_tokens_per_second"] = generated / generating if generating else None
    if peak is not None:
        values["throughput/mfu"] = flops / training / peak if training else None
    return values
