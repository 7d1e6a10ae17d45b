"""What can be asked of CUDA while something runs: that nothing waits for it, how much memory it took, what it ran."""

import gc
from contextlib import contextmanager

import torch


@contextmanager
def no_sync():
    """Fails where the host waits for the device, as far as PyTorch can tell."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(function):
    """The most that was allocated while ``function`` ran, above what was allocated before; run it once to warm up."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def kernel_names(function):
    """Lower-case names of the CUDA kernels that ran."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return {event.name.lower() for event in profile.events() if event.device_type == device}
