"""Checks of nodes against each other, as pure functions of what the nodes have reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fipo_megatron.preflight.blame import nodes_at_fault
from fipo_megatron.preflight.job import Cell, Job, most_frequent
from fipo_megatron.preflight.node_facts import NeighbourFacts


def check_driver(job: Job) -> Mapping[int, Cell]:
    """Checks that the trainer's nodes with GPUs have the same driver, and so the nodes that serve."""
    cells = {rank: Cell("-") for rank in job.usable()}
    for nodes in job.by_use():
        drivers = {rank: node.gpus.driver for rank, node in nodes.items() if node.gpus.driver}
        wanted = most_frequent(drivers) if drivers else ""
        for rank, driver in drivers.items():
            problem = ""
            if driver != wanted:
                problem = f"driver {driver}; must be {wanted}, as on {_owner(job, drivers, wanted)}"
            cells[rank] = Cell(driver, problem)
    return cells


def check_versions(job: Job) -> Mapping[int, Cell]:
    """Checks that Python, all packages and the sources of this package are the same on all nodes."""
    return _same_versions(job, {rank: node.versions for rank, node in job.usable().items()}, "torch", "")


def check_servers(job: Job) -> Mapping[int, Cell]:
    """Checks that SGLang's environment can be used, fits the trainer's NCCL, and has the same packages on all nodes.

    In a job with nodes that serve, it is theirs alone.
    """
    nodes = job.usable()
    if job.expected.rollout_nodes:
        nodes = {rank: node for rank, node in nodes.items() if node.serves}
    versions = {rank: node.server_versions for rank, node in nodes.items()}
    cells = dict(_same_versions(job, versions, "sglang", "in SGLang's environment "))
    for rank, node in nodes.items():
        if node.server_problem:
            cells[rank] = Cell("bad", node.server_problem)
    return cells


def check_inputs(job: Job) -> Mapping[int, Cell]:
    """Checks that every node can read model and data, and sees the same files."""
    nodes = job.usable()
    problems: dict[int, list[str]] = {rank: [] for rank in nodes}
    sizes = dict.fromkeys(nodes, 0)
    for number in range(max((len(node.inputs) for node in nodes.values()), default=0)):
        facts = {rank: node.inputs[number] for rank, node in nodes.items() if number < len(node.inputs)}
        digests = {rank: fact.digest for rank, fact in facts.items() if not fact.problem}
        wanted = most_frequent(digests) if digests else ""
        for rank, fact in facts.items():
            sizes[rank] += fact.size
            if fact.problem:
                problems[rank].append(f"{fact.field}: {fact.problem}")
            elif fact.digest != wanted:
                problems[rank].append(
                    f"{fact.field}: its files or their sizes differ ({fact.size} bytes); they must be those of "
                    f"{_owner(job, digests, wanted)}"
                )
    return {rank: Cell(_size(sizes[rank]), "; ".join(problems[rank])) for rank in nodes}


def check_visibility(job: Job) -> Mapping[int, Cell]:
    """Checks that all nodes see each other's files in the output directory."""
    return _between(
        job,
        lambda facts: facts.invisible,
        forward="does not see the file of {other}: {error}",
        backward="its file is not seen by {other}: {error}",
        valid="run.output must be on a file system that all nodes share",
    )


def check_names(job: Job) -> Mapping[int, Cell]:
    """Checks that the host's name of every node can be resolved, by itself and by the others."""
    cells = _between(
        job,
        lambda facts: facts.unresolved,
        forward="{error}",
        backward="on {other}, {error}",
        valid="every node must resolve the name of every node to its address",
    )
    hosts = {node.host for node in job.nodes.values()}
    for rank, node in job.usable().items():
        if node.name_problem and len(hosts) > 1:  # nodes of one host reach each other at a loopback address
            cells[rank] = Cell("own", node.name_problem)
    return cells


def check_connections(job: Job) -> Mapping[int, Cell]:
    """Checks that every node can connect to a port of every other node."""
    return _between(
        job,
        lambda facts: facts.unreachable,
        forward="cannot connect to {other}: {error}",
        backward="{other} cannot connect to it: {error}",
        valid="NCCL, gloo and servers need the ports between the nodes open",
    )


def check_clock(job: Job) -> Mapping[int, Cell]:
    """Checks every clock against the median of all."""
    ahead = {rank: facts.clock_ahead for rank, facts in job.neighbours.items() if facts.clock_ahead is not None}
    if not ahead:
        return {}
    # Of two nodes, node 0 is the reference.
    reference = sorted(ahead.values())[len(ahead) // 2] if len(ahead) > 2 else ahead.get(0, 0.0)
    cells = {rank: Cell("not measured") for rank in job.neighbours}
    for rank, seconds in ahead.items():
        difference = seconds - reference
        problem = ""
        if abs(difference) - job.neighbours[rank].clock_error > job.expected.max_clock_skew:
            problem = (
                f"its clock is {abs(difference):.1f} s {'ahead of' if difference > 0 else 'behind'} the others; at "
                f"most {job.expected.max_clock_skew:g} s are allowed (--max-clock-skew)"
            )
        cells[rank] = Cell(f"{difference:+.3f} s", problem)
    return cells


def check_all_reduce(job: Job) -> Mapping[int, Cell]:
    """Checks the bandwidth of the all-reduce; a slow node is slow alone, or with each of its neighbours.

    A measurement that fails on all nodes says nothing about any of them; see :func:`all_reduce_problems`.
    """
    minimum, failed = job.expected.min_bandwidth, _all_failed(job)
    cells = {}
    for rank, facts in job.all_reduce.items():
        problem = ""
        if facts.problem:
            problem = "" if failed else f"the all-reduce {facts.problem}; it must succeed on all nodes"
        elif facts.own is not None and facts.own < minimum:
            problem = f"an all-reduce of its own GPUs reaches {facts.own:.3g} GB/s"
        elif facts.pairs and max(facts.pairs.values()) < minimum:
            problem = f"an all-reduce with one other node reaches {max(facts.pairs.values()):.3g} GB/s"
        valid = "" if facts.problem else f"; it must reach {minimum:g} GB/s (--min-bandwidth)"
        text = "-" if facts.everywhere is None else f"{facts.everywhere:.3g}"
        cells[rank] = Cell(text, f"{problem}{valid}" if problem else "")
    return cells


def all_reduce_problems(job: Job) -> list[str]:
    """Lists problems of the all-reduce for which no node can be blamed."""
    if _all_failed(job):
        return [f"the all-reduce {next(iter(job.all_reduce.values())).problem}, on every node; it must succeed"]
    measured = [facts.everywhere for facts in job.all_reduce.values() if facts.everywhere is not None]
    if not measured or min(measured) >= job.expected.min_bandwidth:
        return []
    if any(cell.problem for cell in check_all_reduce(job).values()):
        return []
    return [
        f"the all-reduce over all nodes reaches {min(measured):.3g} GB/s; it must reach "
        f"{job.expected.min_bandwidth:g} GB/s (--min-bandwidth), and no node was found to be slower than the others"
    ]


def _all_failed(job: Job) -> bool:
    return bool(job.all_reduce) and all(facts.problem for facts in job.all_reduce.values())


def _same_versions(job: Job, nodes: Mapping[int, Mapping[str, str]], shown: str, where: str) -> Mapping[int, Cell]:
    problems: dict[int, list[str]] = {rank: [] for rank in nodes}
    for package in dict.fromkeys(name for versions in nodes.values() for name in versions):
        found = {rank: versions.get(package, "not installed") for rank, versions in nodes.items()}
        wanted = most_frequent(found)
        for rank, version in found.items():
            if version != wanted:
                problems[rank].append(
                    f"{where}{package} is {version}; must be {wanted}, as on {_owner(job, found, wanted)}"
                )
    return {rank: Cell(versions.get(shown, "-"), "; ".join(problems[rank])) for rank, versions in nodes.items()}


def _between(
    job: Job, failures_of: Callable[[NeighbourFacts], dict[int, str]], *, forward: str, backward: str, valid: str
) -> dict[int, Cell]:
    """Returns a cell for each node; those at fault for failures between two nodes have a problem.

    Args:
        job: Reports of all nodes.
        failures_of: Returns the failures that a node has seen, by rank of the other.
        forward: Sentence about a failure that the node has seen itself, with ``other`` and ``error``.
        backward: Sentence about a failure that the other node has seen.
        valid: The valid values, in words.
    """
    failures = {
        (rank, other): error for rank, facts in job.neighbours.items() for other, error in failures_of(facts).items()
    }
    guilty = nodes_at_fault(failures)
    cells = {}
    for rank in job.neighbours:
        if rank not in guilty:
            cells[rank] = Cell("ok")
            continue
        seen = [forward.format(other=job.names[b], error=error) for (a, b), error in failures.items() if a == rank]
        seen += [backward.format(other=job.names[a], error=error) for (a, b), error in failures.items() if b == rank]
        more = f" (and {len(seen) - 1} more)" if len(seen) > 1 else ""
        cells[rank] = Cell("bad", f"{seen[0]}{more}; {valid}")
    return cells


def _owner(job: Job, values: Mapping[int, str], wanted: str) -> str:
    """Returns the name of the first node with a value."""
    return next(job.names[rank] for rank in sorted(values) if values[rank] == wanted)


def _size(count: int) -> str:
    """Returns a number of bytes in a unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
