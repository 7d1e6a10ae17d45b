"""Queries and keys of packed sequences, rotated by a table and by Megatron-Core's own function."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb

from fipo_megatron.actor.rotary import PackedRotaryEmbedding, RotationTable
from fipo_megatron.data.context_parallel import CpLayout

HEADS, GROUPS = 4, 2


@dataclass
class Group:
    """A context-parallel group, as far as Megatron's rotary embedding asks."""

    layout: CpLayout

    def size(self):
        return self.layout.size

    def rank(self):
        return self.layout.rank


@dataclass
class Case:
    """Sequences of random lengths, and the projection of this rank's tokens to queries, keys and values."""

    layout: CpLayout
    lengths: list[int]
    projection: torch.Tensor
    grads: list[torch.Tensor]

    @classmethod
    def random(cls, seed, layout, head_dim, dtype, device="cpu"):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        sequences = int(rng.integers(1, 12))
        lengths = [layout.padded_length(int(length)) for length in rng.integers(1, 130, sequences)]
        tokens = sum(lengths) // layout.size

        def normal(heads):
            return torch.randn(tokens, heads, head_dim, generator=generator).to(dtype).to(device)

        return cls(layout, lengths, normal(HEADS + 2 * GROUPS), [normal(HEADS), normal(GROUPS)])

    @property
    def cu_seqlens(self):
        return np.cumsum([0, *self.lengths], dtype=np.int32)

    def by_table(self, table: RotationTable):
        """Rotated queries and keys, and the gradient of the projection."""
        starts = np.repeat(self.cu_seqlens[:-1], self.lengths)
        positions = (np.arange(sum(self.lengths)) - starts)[self.layout.indices(self.cu_seqlens)]
        rotation = table.rotation(torch.from_numpy(positions).to(self.projection.device), max(self.lengths))
        return self._with_gradient(rotation)

    def by_megatron(self, frequencies, config):
        """The same by Megatron's unfused function, from the boundaries."""
        angles = PackedRotaryEmbedding(frequencies)(max(self.lengths), packed_seq=True)
        cu_seqlens, group = torch.from_numpy(self.cu_seqlens), Group(self.layout)  # on the host, as the actor has them
        return self._with_gradient(
            lambda *both: [apply_rotary_pos_emb(each, angles, config, cu_seqlens, cp_group=group) for each in both]
        )

    def _with_gradient(self, rotate):
        projection = self.projection.detach().requires_grad_()
        query, key, _ = projection.split([HEADS, GROUPS, GROUPS], dim=1)
        rotated = list(rotate(query, key))
        torch.autograd.backward(rotated, self.grads)
        return [*(each.detach() for each in rotated), projection.grad]
