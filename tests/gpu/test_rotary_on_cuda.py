"""The rotation of a micro-batch on CUDA: the bits of Megatron-Core's, and no waiting for the device."""

import pytest
import torch

from fipo_megatron.actor.megatron_config import transformer_config
from fipo_megatron.actor.rotary import RotationTable, inverse_frequencies
from fipo_megatron.config import ActorConfig
from fipo_megatron.data.context_parallel import CpLayout
from tests.actor.rotary_cases import Case
from tests.gpu.actors import TORCH_LAYERS, reference_of
from tests.gpu.cuda_checks import no_sync

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [CpLayout(), CpLayout(2, 0), CpLayout(4, 3)], ids=str)
def test_rotated_heads_and_gradients_have_the_bits_of_megatron(layout, dtype, device):
    architecture = reference_of("qwen3").architecture
    config = transformer_config(architecture, ActorConfig(dtype=dtype, transformer=TORCH_LAYERS))
    frequencies = inverse_frequencies(architecture.rope, architecture.head_dim).to(device)
    table = RotationTable(frequencies, DTYPES[dtype])
    for seed in range(4):
        case = Case.random(seed, layout, architecture.head_dim, DTYPES[dtype], device)
        mine, expected = case.by_table(table), case.by_megatron(frequencies, config)
        assert all(torch.equal(*pair) for pair in zip(mine, expected, strict=True)), (seed, case.lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_never_waits(dtype, device):
    """Neither while the table grows nor in a layer's forward and backward pass."""
    architecture = reference_of("qwen3").architecture
    table = RotationTable(inverse_frequencies(architecture.rope, architecture.head_dim).to(device), DTYPES[dtype])
    lengths = [300, 33]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    query, key = (
        torch.randn(sum(lengths), heads, architecture.head_dim, device=device, dtype=DTYPES[dtype], requires_grad=True)
        for heads in (8, 2)
    )
    with no_sync():
        rotated = table.rotation(positions, max(lengths))(query, key)
        torch.autograd.backward(rotated, [torch.ones_like(each) for each in rotated])
