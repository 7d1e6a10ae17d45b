"""The names of the nodes of a job step, which ``sbatch --exclude`` takes."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from itertools import product


def own_name(environment: Mapping[str, str]) -> str:
    """Returns the name of this node: Slurm's ``SLURMD_NODENAME``, else the host's name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def names_of_ranks(environment: Mapping[str, str], nodes: int) -> dict[int, str]:
    """Returns the expected name of each node by rank; empty if the launcher does not tell.

    With one task per node, Slurm numbers the tasks in the order of the step's node list. In a step over several
    components of a heterogeneous job they are numbered component by component, while the step's list is sorted.

    Args:
        environment: Environment of a task.
        nodes: Number of nodes of the step.
    """
    size = environment.get("SLURM_HET_SIZE", "")
    components = range(int(size) if size.isdecimal() else 0)
    lists = [
        ",".join(environment.get(f"SLURM_JOB_NODELIST_HET_GROUP_{number}", "") for number in components),
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""),
    ]
    return next((dict(enumerate(names)) for names in map(expand, lists) if len(names) == nodes), {})


def expand(node_list: str) -> list[str]:
    """Returns all names of a Slurm node list: ``n01``, ``n02`` and ``gpu`` for ``n[01-02],gpu``."""
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        pieces = re.split(r"\[([^\]]*)\]", entry.strip())  # every second piece is the inside of brackets
        choices = [_numbers(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _numbers(inside: str) -> list[str]:
    found = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return found
