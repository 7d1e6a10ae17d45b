"""The table of devices."""

import re

import pytest

from fipo_megatron.observe.devices import DEVICES, device, find_device, peak_flops


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_device_is_found_by_the_name_that_torch_reports(reported, name):
    found = find_device(reported)
    assert found is device(name)
    assert peak_flops(reported) == found.bf16_flops


def test_unknown_devices():
    assert find_device("") is None
    assert peak_flops("AMD Instinct MI300X") is None
    with pytest.raises(ValueError, match=re.escape("device = h1000: must be one of h100-pcie, h100-nvl, h100, ")):
        device("h1000")


def test_units():
    """A peak in TFLOP/s or a bandwidth in GB/s instead of the base unit is off by orders of magnitude."""
    for known in DEVICES:
        assert 1e14 < known.bf16_flops < 3e15
        assert known.fp8_flops is None or 1.9 < known.fp8_flops / known.bf16_flops < 2.1
        assert 5e11 < known.memory_bandwidth < 1e13
        assert 1e10 < known.network <= known.nvlink < 2e12
        assert 30 < known.memory_gib < 200
