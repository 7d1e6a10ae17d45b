"""Divisors of the tokens of a micro-batch, as the parallel layout and the FP8 recipe require them."""

from __future__ import annotations

import math

from fipo_megatron.config.actor_sections import ActorConfig


def token_multiple(actor: ActorConfig) -> int:
    """Returns the divisor of the number of tokens of a micro-batch on one context-parallel rank.

    Sequence parallelism splits the tokens into ``tensor_parallel`` parts. FP8 matrix products need multiples of 16 in
    each part (``get_fp8_align_size`` of ``megatron/core/fp8_utils.py``). Blockwise scaling shares a scale between 128
    tokens; a block must not lie on two tensor-parallel ranks, which would compute two scales.
    """
    parts = actor.parallel.tensor_parallel if actor.parallel.sequence_parallel else 1
    if actor.fp8 == "off":
        return parts
    return (128 if actor.fp8_recipe == "blockwise" else 16) * parts


def micro_batch_multiple(actor: ActorConfig) -> int:
    """Returns the divisor of the number of tokens of a micro-batch over all context-parallel ranks.

    Context parallelism cuts every sequence into two chunks per rank; the end of the micro-batch is padded once to
    :func:`token_multiple` per rank (:func:`fipo_megatron.data.packing.pack`).
    """
    size = actor.parallel.context_parallel
    return math.lcm(2 * size if size > 1 else 1, size * token_multiple(actor))
