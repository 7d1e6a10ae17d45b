"""Throughput of a step: tokens per second, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from fipo_megatron.data.packing import MiniBatch, SequenceCost, imbalance
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

FORWARD, TRAINING = 1, 3
"""Work of a forward pass, and of forward and backward: backward is twice the work of forward."""


@cache
def matrix_parameters(architecture: Architecture) -> int:
    """Counts the weights of the matrix products of a token, N.

    The output layer is among them, the input embedding is not, and of a mixture only the top-k experts are. Biases and
    norms are no matrices.
    """
    matrices = (weight for weight in tables.all_weights(architecture) if len(weight.tensors[0][1]) == 2)
    count = sum(weight.elements for weight in matrices)
    count -= architecture.vocab * architecture.hidden * (not architecture.tied)
    mixture = architecture.mixture
    if mixture is not None:
        count -= sum(mixture.layers) * (mixture.experts - mixture.top_k) * 3 * architecture.hidden * mixture.ffn
    return count


def model_flops(architecture: Architecture, lengths: Sequence[int]) -> float:
    """Returns the model FLOPs of a forward pass over packed sequences of these lengths (:func:`pass_flops`)."""
    return pass_flops(architecture, sum(lengths), sum(length * length / 2 for length in lengths))


def pass_flops(architecture: Architecture, tokens: float, pairs: float) -> float:
    """Returns the model FLOPs of a forward pass: 2 per weight and token, plus attention.

    As in Kaplan et al. (arXiv 2001.08361, Sec. 2.1) with the output layer. Causal attention has ``L² / 2`` pairs of
    positions, each with two products of ``heads × head_dim`` numbers: as in PaLM (arXiv 2204.02311, App. B) except for
    the half. Recomputation is no part of it.

    Args:
        architecture: Architecture of the model.
        tokens: Tokens of all sequences.
        pairs: Half the sum of their squared lengths.
    """
    cost = sequence_cost(architecture)
    return float(cost.linear * tokens + 2 * cost.quadratic * pairs)


def sequence_cost(architecture: Architecture) -> SequenceCost:
    """Returns the FLOPs of a forward pass over a sequence (:func:`pass_flops`) by its length."""
    attention = 2 * architecture.layers * architecture.heads * architecture.head_dim
    return SequenceCost(2 * matrix_parameters(architecture), attention)


def balance(
    plan: Sequence[MiniBatch], lengths: Sequence[int], architecture: Architecture, *, lockstep: int = 1
) -> dict[str, float | None]:
    """Returns the metrics of how equally the data-parallel ranks share the FLOPs of a step, by tag.

    Args:
        plan: Mini-batches of the step, at least one.
        lengths: Tokens of each trajectory.
        architecture: Architecture of the model.
        lockstep: Ranks that wait for each other in every micro-batch (:func:`.data.packing.imbalance`).
    """
    ratio = imbalance(plan, lengths, sequence_cost(architecture), lockstep=lockstep)
    return {"throughput/cost_imbalance": ratio, "throughput/idle_fraction": 1 - 1 / ratio}


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
