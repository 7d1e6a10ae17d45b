"""Packed attention by its definition with a dense mask, and all context-parallel ranks in one process."""

from dataclasses import dataclass, field

import numpy as np
import torch

from fipo_megatron.actor.attention import KeyValueExchange, packed_causal_attention
from fipo_megatron.data.context_parallel import CpLayout


@dataclass
class Case:
    """A whole packed micro-batch and the gradient of its loss with respect to the output of attention."""

    cu_seqlens: list[int]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor

    @property
    def tensors(self):
        return self.query, self.key, self.value, self.grad

    def of_rank(self, layout):
        indices = torch.from_numpy(layout.indices(self.cu_seqlens))
        return Case(self.cu_seqlens, *(tensor[indices] for tensor in self.tensors))


def random_case(seed, lengths, cp=1, groups=1, ratio=1, dim=16, dtype=torch.float64):
    """Returns sequences of these lengths, padded for ``cp`` ranks; some scores give a peaked softmax."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = np.cumsum([0, *(CpLayout(cp).padded_length(n) for n in lengths)]).tolist()
    heads = (groups * ratio, groups, groups, groups * ratio)
    tensors = [torch.randn(cu_seqlens[-1], n, dim, dtype=torch.float64, generator=generator) for n in heads]
    tensors[0] *= 2
    return Case(cu_seqlens, *(tensor.to(dtype) for tensor in tensors))


def plain_attention(case, scale=None):
    """Computes output and gradients of query, key and value in float64."""
    query, key, value = (t.detach().double().requires_grad_() for t in (case.query, case.key, case.value))
    outputs = []
    for start, end in zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    out = torch.cat(outputs)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), case.grad.double())


def attend(case, **arguments):
    """Computes output and gradients of ``packed_causal_attention`` for the tokens in ``case``."""
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    out = packed_causal_attention(*leaves, case.cu_seqlens, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, case.grad)


@dataclass
class SimulatedRanks:
    """Exchanges between ranks that run one after the other, twice: the first round only records gradients."""

    parts: list[Case]
    contributions: dict[int, torch.Tensor] = field(default_factory=dict)

    def exchange(self, rank):
        key_values = torch.stack([torch.stack([part.key, part.value], dim=1) for part in self.parts])

        def gather(message):
            assert torch.equal(message, key_values[rank])
            return key_values

        def reduce_scatter(message):
            self.contributions[rank] = message
            return sum(contribution[rank] for contribution in self.contributions.values())

        return KeyValueExchange(gather, reduce_scatter)


def in_simulated_ranks(case, size, **arguments):
    """Returns the result of :func:`attend` of every rank."""
    layouts = [CpLayout(size, rank) for rank in range(size)]
    ranks = SimulatedRanks([case.of_rank(layout) for layout in layouts])
    for _ in range(2 if size > 1 else 1):
        results = [
            attend(part, layout=layout, exchange=ranks.exchange(layout.rank), **arguments)
            for part, layout in zip(ranks.parts, layouts, strict=True)
        ]
    return results


def whole(results, cu_seqlens):
    """Assembles the results of all ranks in packed order."""
    layouts = [CpLayout(len(results), rank) for rank in range(len(results))]
    order = torch.from_numpy(np.concatenate([layout.indices(cu_seqlens) for layout in layouts])).argsort()
    return [torch.cat(parts)[order] for parts in zip(*results, strict=True)]


def largest_error(got, want):
    """Returns the largest error of output and gradients, each relative to its largest entry, at least 1."""
    errors = [
        (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in zip(got, want, strict=True)
    ]
    assert not any(np.isnan(errors))
    return max(errors)
