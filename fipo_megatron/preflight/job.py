"""Everything that is known about the nodes of a job, and what is expected of them: the input of all checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fipo_megatron.config import ParallelConfig
from fipo_megatron.preflight.gathering import Absent
from fipo_megatron.preflight.memory_plan import PlannedMemory
from fipo_megatron.preflight.node_facts import AllReduceFacts, NeighbourFacts, NodeFacts

Value = TypeVar("Value")


@dataclass(frozen=True)
class Expected:
    """The requirements that all nodes must meet.

    Attributes:
        gpus_per_node: GPUs of each node; None: as many as Slurm gives to it, else as many as most nodes have.
        rollout_nodes: Nodes that run servers alone, the last ones.
        min_bandwidth: Bus bandwidth of the all-reduce in GB/s; 0 if it is not measured.
        max_clock_skew: Largest difference of two clocks in seconds.
        seconds: Seconds within which a node must report.
        parallel: The actor's layout.
        server_gpus: GPUs of each of the trainer's nodes that belong to servers alone.
        memory: Planned memory of the GPUs; None if it was not planned.
    """

    gpus_per_node: int | None = None
    rollout_nodes: int = 0
    min_bandwidth: float = 0.0
    max_clock_skew: float = 1.0
    seconds: float = 60.0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    server_gpus: int = 0
    memory: PlannedMemory | None = None


@dataclass(frozen=True)
class Job:
    """The reports of all nodes.

    Attributes:
        expected: Requirements on the nodes.
        names: Name of every node by rank, missing ones included.
        nodes: Facts of each node about itself.
        absent: Nodes that have not reported.
        neighbours: Findings of each node about the others.
        all_reduce: Measurements of each node; empty if nothing was measured.
        job_problems: Problems that no node has found and that concern all of them, a sentence each.
    """

    expected: Expected
    names: Mapping[int, str]
    nodes: Mapping[int, NodeFacts]
    absent: Mapping[int, Absent] = field(default_factory=dict)
    neighbours: Mapping[int, NeighbourFacts] = field(default_factory=dict)
    all_reduce: Mapping[int, AllReduceFacts] = field(default_factory=dict)
    job_problems: tuple[str, ...] = ()

    def usable(self) -> dict[int, NodeFacts]:
        """Returns the nodes that could examine themselves."""
        return {rank: node for rank, node in self.nodes.items() if not node.config_problem}

    def by_use(self) -> list[dict[int, NodeFacts]]:
        """Returns the usable nodes of the trainer and those that serve, which may have other GPUs; no empty group."""
        usable = self.usable()
        groups = [{rank: node for rank, node in usable.items() if node.serves == serves} for serves in (False, True)]
        return [group for group in groups if group]

    @property
    def trainer_count(self) -> int:
        """Number of the trainer's nodes, missing ones included."""
        return len(self.names) - self.expected.rollout_nodes


@dataclass(frozen=True)
class Cell:
    """The result of a check on a node.

    Attributes:
        text: Short text for the table.
        problem: The value that was found, and what would be valid; empty if the node is good.
    """

    text: str
    problem: str = ""


Check = Callable[[Job], Mapping[int, Cell]]
"""A check: returns a cell for each node that it has examined."""


def most_frequent(values: Mapping[int, Value]) -> Value:
    """Returns the value that most nodes have; of equally frequent ones that of the lowest rank."""
    counts = Counter(values.values())
    return max(values.items(), key=lambda item: (counts[item[1]], -item[0]))[1]
