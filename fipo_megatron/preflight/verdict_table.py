"""The result of a preflight: which nodes are bad and why, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fipo_megatron.config import layout_conflicts
from fipo_megatron.preflight import agreement_checks, node_checks
from fipo_megatron.preflight.job import Cell, Check, Job

CHECKS: Mapping[str, Check] = {
    "use": node_checks.show_use,
    "report": node_checks.check_report,
    "GPUs": node_checks.check_gpus,
    "memory": node_checks.check_memory,
    "driver": agreement_checks.check_driver,
    "GPU errors": node_checks.check_gpu_errors,
    "output": node_checks.check_output,
    "shared": agreement_checks.check_visibility,
    "disk": node_checks.check_disk,
    "inputs": agreement_checks.check_inputs,
    "names": agreement_checks.check_names,
    "ports": node_checks.check_ports,
    "connections": agreement_checks.check_connections,
    "clock": agreement_checks.check_clock,
    "torch": agreement_checks.check_versions,
    "SGLang": agreement_checks.check_servers,
    "GB/s": agreement_checks.check_all_reduce,
}
"""The checks in the order of the table's columns."""

GOOD, BAD = 0, 1


@dataclass(frozen=True)
class Verdict:
    """The results of all checks.

    Attributes:
        job: Reports of all nodes.
        cells: Results by check and rank.
        job_problems: Problems for which no single node can be blamed, a sentence each.
    """

    job: Job
    cells: Mapping[str, Mapping[int, Cell]]
    job_problems: tuple[str, ...]

    @classmethod
    def of(cls, job: Job) -> Verdict:
        """Runs all checks."""
        cells = {name: check(job) for name, check in CHECKS.items()}
        found = (*_layout_problems(job), *node_checks.memory_problems(job), *agreement_checks.all_reduce_problems(job))
        return cls(job, cells, (*job.job_problems, *found))

    @property
    def bad_nodes(self) -> list[str]:
        """Names of the bad nodes, in the order of their ranks."""
        bad = {rank for cells in self.cells.values() for rank, cell in cells.items() if cell.problem}
        return [self.job.names[rank] for rank in sorted(bad)]

    @property
    def code(self) -> int:
        """Exit code: 0 if the job can start, else 1."""
        return BAD if self.bad_nodes or self.job_problems else GOOD

    def problems(self) -> dict[str, list[str]]:
        """Returns the sentences about each bad node, by its name."""
        found: dict[str, list[str]] = {name: [] for name in self.bad_nodes}
        for check, cells in self.cells.items():
            for rank, cell in sorted(cells.items()):
                if cell.problem:
                    found[self.job.names[rank]].append(f"{check}: {cell.problem}")
        return found

    def table(self) -> str:
        """Returns the table, the sentences and a closing line as text."""
        ranks = sorted(self.job.names)
        columns = [["node", *(self.job.names[rank] for rank in ranks)]]
        for name, cells in self.cells.items():
            texts = [_text(cells.get(rank)) for rank in ranks]
            if any(text != "-" for text in texts):
                columns.append([name, *texts])
        widths = [max(map(len, column)) for column in columns]
        rows = zip(*columns, strict=True)
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        sentences = [f"{name}: {problem}" for name, problems in self.problems().items() for problem in problems]
        sentences += [f"job: {problem}" for problem in self.job_problems]
        bad = self.bad_nodes
        closing = f"preflight: {len(ranks) - len(bad)} of {len(ranks)} nodes are good"
        closing += f"; bad: {','.join(bad)}" if bad else ""
        closing += "; the job as a whole cannot start" if self.job_problems else ""
        return "\n".join([*lines, *([""] if sentences else []), *sentences, "", closing])

    def to_json(self) -> str:
        """Returns the results, and all facts, as JSON."""
        nodes = [
            {
                "name": self.job.names[rank],
                "rank": rank,
                "problems": self.problems().get(self.job.names[rank], []),
                "cells": {check: cells[rank].text for check, cells in self.cells.items() if rank in cells},
                "facts": asdict(self.job.nodes[rank]) if rank in self.job.nodes else None,
                "neighbours": asdict(self.job.neighbours[rank]) if rank in self.job.neighbours else None,
                "all_reduce": asdict(self.job.all_reduce[rank]) if rank in self.job.all_reduce else None,
            }
            for rank in sorted(self.job.names)
        ]
        content = {"code": self.code, "bad": self.bad_nodes, "job_problems": list(self.job_problems), "nodes": nodes}
        return json.dumps(content, indent=2) + "\n"


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return "BAD" if cell.problem else cell.text


def _layout_problems(job: Job) -> list[str]:
    """Lists why the actor's layout does not fit the GPUs of the trainer's good nodes."""
    gpus = {node.gpus.usable for node in job.usable().values() if not node.serves}
    if len(gpus) != 1 or (count := next(iter(gpus))) == 0:
        return []
    ranks = job.trainer_count * (count - job.expected.server_gpus)
    if ranks <= 0:
        return [f"{count} GPUs per node: the servers take {job.expected.server_gpus} and leave none to the trainer"]
    return layout_conflicts(job.expected.parallel, ranks)
