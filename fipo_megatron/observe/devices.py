"""Devices: memory, peak rates and bandwidths of GPUs, from NVIDIA's data sheets.

The metrics of a run read the peak from here, ``benchmarks.gpu`` its denominator of MFU, and ``fipo plan`` all of it.
Peaks are those of dense matrices; the data sheets of Hopper and later list twice as much, "with sparsity". Bandwidths
of links are those of one GPU in one direction, half of what the data sheets list for NVLink and PCIe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU and its links.

    Attributes:
        name: Name on the command line.
        match: Part of the name that torch reports.
        memory_gib: Memory in GiB as torch reports it.
        bf16_flops: Peak FLOP/s of dense bfloat16 matrix products.
        fp8_flops: Peak FLOP/s of dense FP8 matrix products; None if there are none.
        memory_bandwidth: Bytes per second of device memory.
        nvlink: Bytes per second between GPUs of a node, in one direction.
        network: Bytes per second of a GPU's share of the node's network, in one direction: that of NVIDIA's own system
            with this GPU, such as eight 400 Gb/s adapters for eight H100.
        host_link: Bytes per second between a GPU and the host's memory, in one direction.
        source: Page with the figures.
    """

    name: str
    match: str
    memory_gib: float
    bf16_flops: float
    fp8_flops: float | None
    memory_bandwidth: float
    nvlink: float
    network: float
    host_link: float
    source: str


_G, _T = 1e9, 1e12
_PAGES = "https://www.nvidia.com/en-us/data-center"
_A100, _H100, _H200, _B200, _L40S = (f"{_PAGES}/{name}/" for name in ("a100", "h100", "h200", "dgx-b200", "l40s"))
_H20 = "https://github.com/verl-project/verl/blob/1dda039b9c6311889a9c9a26040677e1254814f9/docs/advance/mtp.md"
DEVICES = (
    Device("h100-pcie", "H100 PCIe", 79.1, 756e12, 1513e12, 2.0 * _T, 300 * _G, 25 * _G, 64 * _G, _H100),
    Device("h100-nvl", "H100 NVL", 93.1, 835e12, 1671e12, 3.9 * _T, 300 * _G, 25 * _G, 64 * _G, _H100),
    Device("h100", "H100", 79.1, 989e12, 1979e12, 3.35 * _T, 450 * _G, 50 * _G, 64 * _G, _H100),
    Device("h200", "H200", 139.8, 989e12, 1979e12, 4.8 * _T, 450 * _G, 50 * _G, 64 * _G, _H200),
    Device("h800", "H800", 79.1, 989e12, 1979e12, 3.35 * _T, 200 * _G, 50 * _G, 64 * _G, _H100),
    Device("h20", "H20", 95.1, 148e12, 296e12, 4.0 * _T, 450 * _G, 50 * _G, 64 * _G, _H20),
    Device("a100-40", "A100-SXM4-40GB", 39.4, 312e12, None, 1.555 * _T, 300 * _G, 25 * _G, 32 * _G, _A100),
    Device("a100-80", "A100", 79.1, 312e12, None, 2.039 * _T, 300 * _G, 25 * _G, 32 * _G, _A100),
    Device("a800", "A800", 79.1, 312e12, None, 2.039 * _T, 200 * _G, 25 * _G, 32 * _G, _A100),
    Device("b200", "B200", 178.3, 2250e12, 4500e12, 8.0 * _T, 900 * _G, 50 * _G, 64 * _G, _B200),
    Device("l40s", "L40S", 44.4, 362e12, 733e12, 0.864 * _T, 32 * _G, 25 * _G, 32 * _G, _L40S),
)
"""The known devices; a name that torch reports is that of the first whose ``match`` it contains."""


def device(name: str) -> Device:
    """Returns the device of a name on the command line.

    Raises:
        ValueError: The name is not known.
    """
    for known in DEVICES:
        if known.name == name.lower():
            return known
    raise ValueError(f"device = {name}: must be one of {', '.join(known.name for known in DEVICES)}")


def find_device(reported: str) -> Device | None:
    """Returns the device of a name that torch reports; None if it is not known."""
    return next((known for known in DEVICES if known.match in reported), None)


def peak_flops(reported: str) -> float | None:
    """Returns the peak FLOP/s of dense bfloat16 of the device that torch reports; None if it is not known."""
    found = find_device(reported)
    return found.bf16_flops if found else None
