"""The bandwidth of an all-reduce over all GPUs of a job, measured by processes of its own that can be killed.

Without a GPU every node has one process, and the transport is gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from fipo_megatron.preflight.node_facts import AllReduceFacts
from fipo_megatron.storage.json_files import one_line


@dataclass(frozen=True)
class AllReducePlan:
    """The all-reduce to measure; the same on all nodes.

    Attributes:
        processes: Processes of each node, by its rank in ascending order.
        minimum: Bus bandwidth in GB/s; below it, nodes are also measured alone and in pairs.
        host: Host of the store.
        port: Port of the store.
        cuda: Whether GPUs and NCCL are used.
        seconds: Time limit.
    """

    processes: dict[int, int]
    minimum: float
    host: str
    port: int
    cuda: bool
    seconds: float

    def to_json(self) -> str:
        """Returns all values as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: str) -> AllReducePlan:
        """Reads what :meth:`to_json` wrote."""
        return TypeAdapter(cls).validate_json(content)

    def first_rank(self, node: int) -> int:
        """Returns the rank of the first process of a node."""
        return sum(count for rank, count in self.processes.items() if rank < node)

    @property
    def world_size(self) -> int:
        """Number of all processes."""
        return sum(self.processes.values())


def measure(plan: AllReducePlan, node: int) -> AllReduceFacts:
    """Starts the processes of this node and waits for them; kills those that do not end in time.

    Args:
        plan: The all-reduce to measure.
        node: Rank of this node.
    """
    program = [sys.executable, "-m", "fipo_megatron.preflight.all_reduce_rank", plan.to_json(), str(node)]
    count, end = plan.processes[node], time.monotonic() + plan.seconds
    environment = _without_launcher(os.environ)
    started = [
        subprocess.Popen(
            [*program, str(local)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for local in range(count)
    ]
    problem, answers = "", []
    try:
        for local, process in enumerate(started):
            try:
                output, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                problem = problem or f"had not ended after {plan.seconds:g} s"
                process.kill()
                output, _ = process.communicate()
            else:
                if process.returncode:
                    last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                    problem = problem or f"failed: {one_line(last[0])}"
            if local == 0:
                answers = output.strip().splitlines()
    finally:
        for process in started:
            process.kill()
            process.wait()
    if answers:  # the bandwidth of the whole job is known, even if that of its parts took too long
        return AllReduceFacts.from_json(answers[-1].encode())
    return AllReduceFacts(problem=problem)


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without the variables that make torch look for the launcher's store."""
    return {name: text for name, text in environment.items() if not name.startswith(("TORCHELASTIC_", "PET_"))}
