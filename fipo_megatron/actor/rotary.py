"""Rotary position embeddings of packed sequences, with the frequencies that transformers uses.

Megatron-Core's embeddings do not cover the models here: its llama3 scaling has no setting except the factor, and its
fused kernel for packed sequences drops YaRN's attention factor. The frequencies are therefore computed here, and the
softmax scale contains the attention factor, which is equivalent: queries and keys are both multiplied by it.

The layers of Transformer Engine take the angles (:class:`PackedRotaryEmbedding`). Those of torch take the cosines and
sines of a micro-batch, which are computed once for all layers (:class:`RotationTable`): Megatron-Core's unfused
embedding computes them from the boundaries in every layer, for queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable

from fipo_megatron.weights.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Computes the radians per position of every pair of dimensions.

    Follows transformers' ``modeling_rope_utils`` operation by operation, so the float32 values are identical.

    Args:
        rope: Kind of the embedding and its settings.
        head_dim: Width of a head.

    Returns:
        ``[head_dim / 2]`` float32.
    """
    wavelength_in_turns = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    base = 1.0 / wavelength_in_turns
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, head_dim)
        return 1.0 / (rope.factor * wavelength_in_turns) * (1 - kept) + base * kept
    return base


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Stretches long wavelengths, keeps short ones and blends those in between."""
    wavelength = 2 * math.pi / base
    longest = rope.original_positions / rope.low_frequency_factor
    shortest = rope.original_positions / rope.high_frequency_factor
    blend = (rope.original_positions / wavelength - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    blended = (1 - blend) * base / rope.factor + blend * base
    outside = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength < shortest) | (wavelength > longest), outside, blended)


def _yarn_ramp(rope: Rope, head_dim: int) -> Tensor:
    """Returns 0 for dimensions that are kept, up to 1 for those that are stretched (arXiv 2309.00071, Sec. 3.2)."""

    def dimension_with(rotations: float) -> float:
        positions_per_radian = rope.original_positions / (rotations * 2 * math.pi)
        return (head_dim * math.log(positions_per_radian)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width, 0, 1)


class PackedRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]  # Megatron has no types
    """Rotary angles of every position, for packed sequences.

    Megatron's class caches the tables of the last 32 lengths over all models (an ``lru_cache`` on the method). This one
    keeps a single table per model, that of the longest sequence so far.

    Args:
        frequencies: ``[head_dim / 2]`` float32, on the device of the model.
    """

    def __init__(self, frequencies: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.inv_freq = frequencies
        self._angles = frequencies.new_empty(0, 1, 1, 2 * len(frequencies))

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: object = None) -> Tensor:
        """Returns the angles of positions 0 to ``max_seq_len``, the longest padded length of the micro-batch.

        The table has exactly that length: Megatron would take one as long as the whole micro-batch for a table that
        runs through all its sequences (``rope_utils.py``, ``_apply_rotary_pos_emb_thd``).

        Returns:
            ``[max_seq_len, 1, 1, head_dim]`` float32, also under context parallelism: the positions of each rank are
            selected where the angles are applied.

        Raises:
            ValueError: the sequences are not packed.
        """
        if not packed_seq or offset:
            raise ValueError("PackedRotaryEmbedding: sequences must be packed (qkv_format 'thd') and start at 0")
        if len(self._angles) < max_seq_len:
            self._angles = _angles(self.inv_freq, max_seq_len)[:, None, None, :]
        return self._angles[:max_seq_len]


@dataclass(frozen=True)
class Rotation:
    """Rotation of the queries and keys of a packed micro-batch, the same in all layers.

    Attributes:
        cos: Cosines of the angles of every token, ``[T, 1, D]``.
        sin: Sines, negative in the first half of the dimensions, ``[T, 1, D]``.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates ``[T, N, D]`` and ``[T, G, D]``; has the bits of Megatron-Core's ``_apply_rotary_pos_emb_thd``."""
        # torch's stub of apply has no types.
        rotated: tuple[Tensor, Tensor] = _Rotate.apply(query, key, self.cos, self.sin)  # type: ignore[no-untyped-call]
        return rotated


class RotationTable:
    """Cosines and sines of every position up to the longest sequence so far.

    Args:
        frequencies: Radians per position, ``[D / 2]`` float32, on the device of the model.
        dtype: Dtype of queries and keys.
    """

    def __init__(self, frequencies: Tensor, dtype: torch.dtype) -> None:
        self._frequencies = frequencies
        self._cos = self._sin = frequencies.new_empty(0, 1, 2 * len(frequencies), dtype=dtype)

    def rotation(self, positions: Tensor, length: int) -> Rotation:
        """Returns the rotation of a micro-batch, without waiting for the device.

        Args:
            positions: Positions of this rank's tokens in their sequences, ``[T]`` int64.
            length: Length of the longest sequence, on the host.
        """
        if len(self._cos) < length:
            angles, dtype = _angles(self._frequencies, length), self._cos.dtype
            first, second = torch.sin(angles).to(dtype).chunk(2, dim=-1)
            self._sin = torch.cat([-first, second], dim=-1)[:, None]
            self._cos = torch.cos(angles).to(dtype)[:, None]
        return Rotation(self._cos.index_select(0, positions), self._sin.index_select(0, positions))


class _Rotate(torch.autograd.Function):
    """Autograd function that keeps the cosines and sines of the micro-batch, and nothing of the layer."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated = [(heads * cos).add_(_swapped(heads).mul_(sin)) for heads in (query, key)]
        return rotated[0], rotated[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation has the opposite angle.
        return *((grad * cos).sub_(_swapped(grad).mul_(sin)) for grad in grads), None, None


def _angles(frequencies: Tensor, length: int) -> Tensor:
    """Returns the angles of positions 0 to ``length``, ``[length, D]`` float32, each half with all frequencies."""
    positions = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles, angles], dim=-1)


def _swapped(heads: Tensor) -> Tensor:
    """Returns a copy of ``[..., D]`` with its halves exchanged."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)
