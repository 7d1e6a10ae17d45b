"""Packed attention on CUDA: against its definition in float64, by the kernel that it should use, in linear memory."""

import pytest
import torch

from fipo_megatron.actor.attention import packed_causal_attention
from fipo_megatron.actor.attention_kernels import Blocked, CudaFlash, choose_kernel
from tests.actor.plain_attention import (
    attend,
    in_simulated_ranks,
    largest_error,
    plain_attention,
    random_case,
    whole,
)
from tests.gpu.cuda_checks import kernel_names, no_sync, peak_bytes

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
MIB = 2**20


def to_device(case, device):
    for name in ("query", "key", "value", "grad"):
        setattr(case, name, getattr(case, name).to(device))
    return case


def random_on_device(device, lengths, dtype=torch.bfloat16, groups=2, ratio=4, dim=64):
    return to_device(random_case(0, lengths, groups=groups, ratio=ratio, dim=dim, dtype=dtype), device)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("ratio", "dim"), [(1, 64), (4, 128), (7, 8)])
@pytest.mark.parametrize("cp", [1, 2])
def test_output_and_gradients_equal_the_definition(dtype, ratio, dim, cp, device):
    case = random_case(0, [1300, 33, 1, 513], cp, groups=2, ratio=ratio, dim=dim, dtype=dtype)
    expected = plain_attention(case)
    to_device(case, device)
    assert isinstance(choose_kernel(case.query), CudaFlash if dtype == torch.bfloat16 else Blocked)
    got = [tensor.cpu() for tensor in whole(in_simulated_ranks(case, cp), case.cu_seqlens)]
    assert all(tensor.dtype == dtype for tensor in got)
    assert largest_error(got, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_neighbours_that_share_a_call_equal_the_definition(dtype, device, record_property):
    """Whether they also have the bits that they have alone is printed and kept in the report."""
    case = random_case(0, [96] * 5 + [33, 200, 200, 1, 1], groups=2, ratio=4, dim=64, dtype=dtype)
    expected = plain_attention(case)
    to_device(case, device)

    class Alone(type(choose_kernel(case.query))):
        rows = 1

    together, alone = attend(case), attend(case, kernel=Alone())
    for name, shared, own in zip(("output", "query", "key", "value"), together, alone, strict=True):
        difference = float((shared - own).abs().max())
        record_property(name, difference)
        print(f"{name}: largest difference from a call of its own {difference:.3g}")
    assert largest_error([tensor.cpu() for tensor in together], expected) <= BOUNDS[dtype]
    assert largest_error([tensor.cpu() for tensor in alone], expected) <= BOUNDS[dtype]


def test_views_of_one_projection_are_taken_as_they_are(device):
    """Megatron hands over slices of the mixed projection, and gradients may come expanded."""
    case = random_case(0, [400, 90], groups=2, ratio=2, dim=64, dtype=torch.bfloat16)
    case.grad = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand_as(case.query)
    expected = plain_attention(case)
    mixed = torch.cat([case.query, case.key, case.value], dim=1).to(device)
    case.query, case.key, case.value = mixed.split([4, 2, 2], dim=1)
    case.grad = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device).expand_as(case.query)
    assert largest_error([tensor.cpu() for tensor in attend(case)], expected) <= BOUNDS[torch.bfloat16]


def test_flash_kernels_run_for_bfloat16_and_only_there(device):
    names = {}
    for dtype in (torch.bfloat16, torch.float32):
        case = random_on_device(device, [512, 200], dtype)
        attend(case)
        names[dtype] = " ".join(kernel_names(lambda case=case: attend(case)))
    assert "flash_fwd" in names[torch.bfloat16], names
    assert "flash_bwd" in names[torch.bfloat16], names
    assert "flash_" not in names[torch.float32], names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_linear_in_the_length(dtype, device):
    peaks = {}
    for length in (2048, 4096, 16_384):
        case = random_on_device(device, [length], dtype)
        peaks[length] = peak_bytes(lambda case=case: attend(case))
    assert peaks[16_384] <= 4.3 * peaks[4096] + 8 * MIB, peaks
    one_head = 16_384**2 * dtype.itemsize
    assert peaks[16_384] <= one_head, "all 8 heads, forward and backward, in less than the scores of one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_host_never_waits(dtype, device):
    case = random_on_device(device, [700, 33], dtype)
    attend(case)
    with no_sync():
        attend(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_twice_and_without_gradients(dtype, device):
    """The log-prob pass and the training pass must agree bit for bit."""
    case = random_on_device(device, [1300, 77], dtype)
    first, second = attend(case)[0], attend(case)[0]
    with torch.no_grad():
        third = packed_causal_attention(case.query, case.key, case.value, case.cu_seqlens)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
