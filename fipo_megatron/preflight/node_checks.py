"""Checks of each node by itself, as pure functions of what the nodes have reported."""

from __future__ import annotations

from collections.abc import Mapping

from fipo_megatron.preflight.job import Cell, Job, most_frequent


def check_report(job: Job) -> Mapping[int, Cell]:
    """Checks that every node has started, examined itself and could read the configuration."""
    cells = {}
    for rank in job.names:
        if absent := job.absent.get(rank):
            limit = f"must report within {job.expected.seconds:g} s (--timeout)"
            if not absent.started:
                cells[rank] = Cell("none", f"has not started; {limit}")
            else:
                cells[rank] = Cell("none", f"has started but not reported, it was examining {absent.part}; {limit}")
        elif rank in job.nodes and (problem := job.nodes[rank].config_problem):
            cells[rank] = Cell("config", f"cannot read the configuration that node 0 reads: {problem}")
        else:
            cells[rank] = Cell("ok")
    return cells


def check_gpus(job: Job) -> Mapping[int, Cell]:
    """Checks the number of GPUs of each node, that torch can use them, and that all nodes have the same."""
    nodes = job.usable()
    if not nodes:
        return {}
    wanted, reason = job.expected.gpus_per_node, "expected (--gpus-per-node or Slurm)"
    kinds = {rank: (node.gpus.names or ("none",))[0] for rank, node in nodes.items()}
    kind = most_frequent(kinds)
    if wanted is None:
        wanted = most_frequent({rank: max(node.gpus.usable, len(node.gpus.names)) for rank, node in nodes.items()})
        reason = "on most nodes"
    cells = {}
    for rank, node in nodes.items():
        gpus, problem = node.gpus, ""
        if gpus.problem:
            problem = gpus.problem
        elif gpus.usable != wanted:
            listed = f"nvidia-smi lists {len(gpus.names)}" if gpus.driver else "there is no nvidia-smi"
            problem = f"torch can use {gpus.usable} GPUs ({listed}); there must be {wanted}, as {reason}"
        elif wanted and kinds[rank] != kind:
            problem = f"has {kinds[rank]}; must have {kind}, as most nodes"
        cells[rank] = Cell(f"{gpus.usable} {_short(gpus.names[0])}" if gpus.names else str(gpus.usable), problem)
    return cells


def check_gpu_errors(job: Job) -> Mapping[int, Cell]:
    """Checks for memory errors and, where the kernel log can be read, for Xid errors of the hardware."""
    cells = {}
    for rank, node in job.usable().items():
        found = [*node.gpus.errors, *(node.gpus.kernel_log or ())]
        text = "ok" if node.gpus.driver else "-"
        if node.gpus.kernel_log is None:
            text = "log not readable"
        problem = f"{'; '.join(found)}; there must be none: reset the GPU or report the node" if found else ""
        cells[rank] = Cell(text, problem)
    return cells


def check_output(job: Job) -> Mapping[int, Cell]:
    """Checks that every node can write and rename a file in the output directory."""
    return {
        rank: Cell("written", f"{node.output_problem}; every node must write there" if node.output_problem else "")
        for rank, node in job.usable().items()
    }


def check_disk(job: Job) -> Mapping[int, Cell]:
    """Checks the free space of the output directory against the checkpoints that the run has still to write."""
    cells = {}
    for rank, node in job.usable().items():
        if node.free_bytes is None:
            cells[rank] = Cell("unknown")
            continue
        problem = ""
        if node.needed_bytes is not None and node.free_bytes < node.needed_bytes:
            problem = (
                f"{node.free_bytes / 1e9:.1f} GB are free at run.output; its checkpoints need about "
                f"{node.needed_bytes / 1e9:.1f} GB (checkpoint.keep_last)"
            )
        cells[rank] = Cell(f"{node.free_bytes / 1e9:.0f} GB", problem)
    return cells


def check_ports(job: Job) -> Mapping[int, Cell]:
    """Checks that the ports of rank 0 and of the servers are free."""
    return {
        rank: Cell(", ".join(node.ports) or "-", "; ".join(node.port_problems)) for rank, node in job.usable().items()
    }


def _short(name: str) -> str:
    """Returns the product name of a GPU without the maker: ``H100`` for ``NVIDIA H100 80GB HBM3``."""
    return name.removeprefix("NVIDIA ").split(" ")[0]
