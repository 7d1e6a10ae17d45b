"""SwiGLU with its own backward pass: the bits of autograd, and less kept for it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipo_megatron.actor.gated_silu import gated_silu


def silu_of_operators(gate_and_value):
    """As in Megatron-Core's MLP, which adds an offset of 0."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * (value + 0.0)


def passes(function, inputs, grad):
    """Returns output and gradients, and the bytes that are kept for backward besides the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    given_storages = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given_storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad)), sum(kept.values())


def assert_same(own, operators, inputs, grad):
    found, kept = passes(own, inputs, grad)
    expected, kept_by_autograd = passes(operators, inputs, grad)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert kept < kept_by_autograd


shapes = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 70))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=40)
@given(shape=shapes, dtype=dtypes, scale=st.sampled_from([1e-4, 1.0, 1e2]), seed=st.integers(0, 2**20))
def test_gated_silu_has_the_bits_of_autograd(shape, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).mul(scale).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    assert_same(gated_silu, silu_of_operators, (both,), grad)
