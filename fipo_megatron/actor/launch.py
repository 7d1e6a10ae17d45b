"""The environment of the launcher, torchrun or Slurm: rank, world size and the address of rank 0.

Imports neither Megatron nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_PORT_BASE, _PORT_RANGE = 20000, 10000
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


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
            ValueError: a variable is missing or not a number.
        """
        names = variable_names(environment)
        if names is None:
            return cls()
        rank, world_size, local_rank = (_number(environment, name) for name in names)
        address = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_JOB_NODELIST", ""))
        if not address:
            raise ValueError(f"MASTER_ADDR: missing; {names[0]} = {rank} needs the host of rank 0")
        if "MASTER_PORT" not in environment and "SLURM_JOB_ID" in environment:
            # Every task computes the same port; two jobs that share a host most likely compute different ones.
            port = _PORT_BASE + _number(environment, "SLURM_JOB_ID") % _PORT_RANGE
        else:
            port = _number(environment, "MASTER_PORT")
        return cls(rank, world_size, local_rank, address, port)


def variable_names(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Returns the launcher's variables for rank, world size and local rank; None for a single process."""
    if "RANK" in environment:
        return _TORCHRUN
    return _SLURM if "SLURM_PROCID" in environment else None


def first_host(node_list: str) -> str:
    """Returns the first host of a Slurm node list: ``node003`` of ``node[003-007,9],gpu1``; empty for an empty list."""
    first_of_each_range = re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)
    return first_of_each_range.partition(",")[0].strip()


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdecimal():
        raise ValueError(f"{name}: expected a number in the environment, got {value!r}")
    return int(value)
