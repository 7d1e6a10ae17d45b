"""The environment of the launcher, torchrun or Slurm: rank, world size and the address of rank 0.

Imports neither Megatron nor torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PORT_BASE, _PORT_RANGE = 20000, 10000
_LARGEST_PORT = 2**16 - 1
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_SHUTDOWN_SECONDS = 30.0
"""Seconds between SIGTERM and SIGKILL that torchrun leaves its workers by default."""


@dataclass(frozen=True)
class Launch:
    """The position of this process in the job, as the launcher describes it.

    Attributes:
        rank: Rank among all processes.
        world_size: Number of processes.
        local_rank: Rank among the processes on this host.
        address: Host of rank 0; empty for a single process.
        port: Port on which rank 0 listens.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """Reads the variables of torchrun, else those of Slurm (``srun``); without either, returns a single process.

        Raises:
            ValueError: a variable is missing, is not a number or does not fit the others; or the process is alone in a
                Slurm job of several tasks.
        """
        names = _variable_names(environment)
        if names is None:
            return cls()
        rank, world_size = rank_and_world_size(environment)
        local_rank = _number(environment, names[2])
        if local_rank >= world_size:
            raise ValueError(f"{names[2]} = {local_rank}: must be below {names[1]} = {world_size}")
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = environment.get("MASTER_ADDR") or first_host(nodes)
        if not address:
            raise ValueError(f"MASTER_ADDR: missing; {names[0]} = {rank} needs the host of rank 0")
        return cls(rank, world_size, local_rank, address, _port(environment))

    @property
    def serves_store(self) -> bool:
        """Whether this process serves the store of all ranks."""
        return self.rank == 0 and not agent_serves_store()


def agent_serves_store() -> bool:
    """Returns whether torchrun's agent serves the store of all ranks, and rank 0 does not."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rank_and_world_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; see :meth:`Launch.from_environment`.

    Raises:
        ValueError: a variable is missing, is not a number or does not fit the other.
    """
    names = _variable_names(environment)
    if names is None:
        return 0, 1
    rank, world_size = _number(environment, names[0]), _number(environment, names[1])
    if rank >= world_size:
        raise ValueError(f"{names[0]} = {rank}: must be below {names[1]} = {world_size}")
    return rank, world_size


def ranks_on_host(environment: Mapping[str, str]) -> int | None:
    """Returns the number of ranks on this host, which torchrun gives the same environment; None under Slurm."""
    if "RANK" not in environment:
        return None if _variable_names(environment) else 1
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    return int(ranks) if ranks.isascii() and ranks.isdecimal() else None


def first_host(node_list: str) -> str:
    """Returns the first host of a Slurm node list: ``node003`` of ``node[003-007,9],gpu1``; empty for an empty list."""
    first_of_each_range = re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)
    return first_of_each_range.partition(",")[0].strip()


def shutdown_seconds(environment: Mapping[str, str]) -> float | None:
    """Returns the seconds after a signal at which torchrun kills its workers; None without torchrun.

    The limit is torchrun's option ``--shutdown-timeout``, which is read from the command line of the parent process, or
    one of the environment variables that replace it.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        command = ""
    option = re.search(r"\0--shutdown[-_]timeout[=\0](\d+)\0", command)
    variables = (environment.get(name, "") for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"))
    found = [option[1]] if option else [value for value in variables if value.isdecimal()]
    return float(found[0]) if found else _SHUTDOWN_SECONDS


def _variable_names(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Returns the launcher's variables for rank, world size and local rank; None for a single process.

    Raises:
        ValueError: The job has several tasks, but ``srun`` has not started them.
    """
    if "RANK" in environment:
        return _TORCHRUN
    if "SLURM_PROCID" not in environment:
        return None
    step = _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else None
    if step is not None and step > 1:
        return _SLURM
    job = _number(environment, "SLURM_NTASKS") if "SLURM_NTASKS" in environment else 1
    if job > 1:
        raise ValueError(
            f"SLURM_NTASKS = {job}: this process is alone, because srun has not started it; start the ranks with srun "
            "or torchrun, or unset SLURM_PROCID for a single process"
        )
    return None


def _port(environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" not in environment and "SLURM_JOB_ID" in environment:
        # Every task computes the same port; two jobs that share a host most likely compute different ones.
        return _PORT_BASE + _number(environment, "SLURM_JOB_ID") % _PORT_RANGE
    port = _number(environment, "MASTER_PORT")
    if not 1 <= port <= _LARGEST_PORT:
        raise ValueError(f"MASTER_PORT = {port}: must be from 1 to {_LARGEST_PORT}")
    return port


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not (value.isascii() and value.isdecimal()) or len(value) > 18:
        raise ValueError(f"{name}: expected a number in the environment, got {value!r}")
    return int(value)
