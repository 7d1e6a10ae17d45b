"""Checks of each node by itself, as pure functions of what the nodes have reported."""

from __future__ import annotations

from collections.abc import Mapping

from fipo_megatron.plan.gpu_memory import GIB
from fipo_megatron.preflight.job import Cell, Job, most_frequent
from fipo_megatron.preflight.node_facts import NodeFacts


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


def show_use(job: Job) -> Mapping[int, Cell]:
    """Shows which nodes serve, in a job that has such nodes."""
    if not job.expected.rollout_nodes:
        return {}
    return {rank: Cell("trainer" if rank < job.trainer_count else "servers") for rank in job.names}


def check_gpus(job: Job) -> Mapping[int, Cell]:
    """Checks the number of GPUs of each node, that torch can use them, and that all nodes have the same.

    The trainer's nodes are compared with each other, and so are those that serve.
    """
    return {rank: cell for nodes in job.by_use() for rank, cell in _check_gpus(job, nodes).items()}


def _check_gpus(job: Job, nodes: Mapping[int, NodeFacts]) -> Mapping[int, Cell]:
    kinds = {rank: (node.gpus.names or ("none",))[0] for rank, node in nodes.items()}
    kind = most_frequent(kinds)
    most = most_frequent({rank: max(node.gpus.usable, len(node.gpus.names)) for rank, node in nodes.items()})
    cells = {}
    for rank, node in nodes.items():
        gpus, problem = node.gpus, ""
        expected = gpus.given if job.expected.gpus_per_node is None else job.expected.gpus_per_node
        reason = "on most nodes" if expected is None else "expected (--gpus-per-node or Slurm)"
        wanted = most if expected is None else expected
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


def check_memory(job: Job) -> Mapping[int, Cell]:
    """Checks the memory of the GPUs of each node against the plan of the run.

    A plan that does not fit the GPUs of most nodes is a problem of the job, not of a node; see
    :func:`memory_problems`.
    """
    cells = {}
    for nodes in job.by_use():
        usual = _usual_memory(nodes)
        for rank, node in nodes.items():
            own = min(node.gpus.memory, default=0)
            if not node.gpus.names:
                cells[rank] = Cell("no GPU")
                continue
            text, problem = _memory_of_node(job, rank, node, own)
            cells[rank] = Cell(text, problem if own < usual else "")
    return cells


def memory_problems(job: Job) -> list[str]:
    """Lists why the run does not fit the GPUs that most nodes have, each reason once."""
    problems = []
    for nodes in job.by_use():
        usual = _usual_memory(nodes)
        problems += [_memory_of_node(job, rank, node, usual)[1] for rank, node in nodes.items() if node.gpus.names]
    return list(dict.fromkeys(filter(None, problems)))


def _usual_memory(nodes: Mapping[int, NodeFacts]) -> int:
    """Returns the memory of the smallest GPU of most nodes that have GPUs; 0 if none has."""
    sizes = {rank: min(node.gpus.memory) for rank, node in nodes.items() if node.gpus.memory}
    return most_frequent(sizes) if sizes else 0


def _memory_of_node(job: Job, rank: int, node: NodeFacts, size: int) -> tuple[str, str]:
    """Returns the planned memory of a node beside a GPU's, and why it does not fit; empty if it does."""
    plan = job.expected.memory
    if plan is None or not size:
        return "not planned", ""
    has = f"{size / GIB:.1f} GiB"
    if not node.serves:
        stage = plan.of_node(rank)
        text, problem = f"{stage.planned / GIB:.1f} of {has}", ""
        if stage.needed > size:
            problem = (
                f"{stage.name} needs {stage.needed / GIB:.1f} GiB, a GPU has {has}; fipo plan names layouts that fit"
            )
        if problem or job.expected.rollout_nodes:
            return text, problem
    else:
        text = f"servers, {has}"
    if plan.responses(size) == 0:
        return text, (
            f"a server has no room for a response of full length beside the weights, a GPU has {has}; "
            "raise rollout.sglang.tp_size"
        )
    return text, ""


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
