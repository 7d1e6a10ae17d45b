"""The environment of server processes: a few variables of this process, and those of ``rollout.servers.environment``.

A launcher describes its job in variables that SGLang and torch read as well. With ``TORCHELASTIC_USE_AGENT_STORE`` of
torchrun, for example, a server waits for a rendezvous that nobody offers. ``OMP_NUM_THREADS``,
``CUDA_DEVICE_MAX_CONNECTIONS`` and ``PYTORCH_CUDA_ALLOC_CONF`` are settings of the trainer: SGLang's memory saver, for
example, does not work with expandable segments. A proxy would receive the calls that a server makes to itself. New
variables of launchers appear with their versions, so this module lists what is kept, not what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping

KEPT = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TERM", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
        *("LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"),
        *("CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING", "CUDA_CACHE_PATH", "GLOO_SOCKET_IFNAME"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"),
    }
)
"""Names of the variables that a server inherits: the user, libraries, compilers, caches and the network interface."""

KEPT_PREFIXES = ("LC_", "XDG_", "NVIDIA_", "NCCL_", "HF_", "SGLANG_", "SGL_", "FLASHINFER_", "UCX_")
"""Beginnings of the names of further variables that a server inherits. NCCL's must agree with those of the trainer."""


def server_environment(inherited: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a server.

    Args:
        inherited: Environment of this process.
        given: Variables that are set for servers; they replace those that are inherited.
    """
    kept = {name: text for name, text in inherited.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    return kept | {"HF_HUB_OFFLINE": "1"} | dict(given)
