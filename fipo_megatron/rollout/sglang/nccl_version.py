"""Compares the NCCL of the trainer with that of the servers, before anything is built.

Trainer and servers form one group for ``rollout.servers.sync = distributed``, and NCCL does not support different
versions in a group: it fails or hangs. SGLang 0.5.23 reports its NCCL at no endpoint. Servers that the run starts are
asked through their Python; the version of other servers stands in the configuration.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fipo_megatron.config import Config
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.server import ServerSpec, run_python

_PROGRAM = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"


def nccl_problem(config: Config) -> str | None:
    """Returns why trainer and servers cannot form a group of NCCL, with both versions; None if they can.

    Without CUDA the group uses gloo, and nothing is compared.
    """
    servers = config.rollout.servers
    if config.rollout.engine != "sglang" or servers.sync != "distributed" or not torch.cuda.is_available():
        return None
    own = trainer_version()
    if not servers.urls:
        try:
            theirs, whose = server_version(config), f"rollout.servers.python = {servers.python}"
        except EngineError as error:
            return f"rollout.servers.python = {servers.python}: its NCCL must be {own}, and cannot be asked: {error}"
    elif servers.nccl_version is None:
        return (
            "rollout.servers.nccl_version = None: must be given with rollout.servers.urls and rollout.servers.sync = "
            f"distributed, because SGLang does not report it; it must be the trainer's, {own}. In the servers' "
            f'environment, python -c "{_PROGRAM}" prints it'
        )
    else:
        theirs, whose = servers.nccl_version, f"rollout.servers.nccl_version = {servers.nccl_version}"
    if theirs == own:
        return None
    return (
        f"{whose}: the servers' NCCL is {theirs}, the trainer's is {own}; both must be the same version with "
        "rollout.servers.sync = distributed (docs/gpu.md says how), or use rollout.servers.sync = disk"
    )


def trainer_version() -> str:
    """Returns the version of this process's NCCL, such as ``2.30.7``."""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def server_version(config: Config) -> str:
    """Asks the Python of the servers for the version of its NCCL; takes some seconds.

    Raises:
        EngineError: it cannot be run, or its torch has no NCCL.
    """
    path = Path(config.rollout.servers.python)
    return run_python(ServerSpec(path, Path(config.model.path), Path(os.devnull)), _PROGRAM, "torch with NCCL")
