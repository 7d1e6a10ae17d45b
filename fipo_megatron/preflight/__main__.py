"""Examines the nodes of a job before it starts: ``srun --ntasks-per-node=1 fipo preflight CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import Config, ConfigError, load_config
from fipo_megatron.preflight.all_reduce import AllReducePlan, measure
from fipo_megatron.preflight.examination import SharedDirectory, examine
from fipo_megatron.preflight.gathering import Absent, Gathering, GatheringError, gathering_port
from fipo_megatron.preflight.greeter import Greeter
from fipo_megatron.preflight.job import Expected, Job
from fipo_megatron.preflight.memory_plan import PlannedMemory, finished_plan, server_gpus, start_plan
from fipo_megatron.preflight.neighbours import examine_neighbours
from fipo_megatron.preflight.node_facts import AllReduceFacts, NeighbourFacts, NodeFacts
from fipo_megatron.preflight.node_names import names_of_ranks, own_name
from fipo_megatron.preflight.port_state import unresolved_urls
from fipo_megatron.preflight.time_limit import finished_in_time
from fipo_megatron.preflight.verdict_table import BAD, Verdict
from fipo_megatron.storage.atomic import write_atomic

REFUSED = 2
"""Exit code for wrong arguments or an invalid configuration."""
_MIN_NCCL, _MIN_GLOO = 20.0, 0.01
_NODES = TypeAdapter(list[NodeFacts])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the preflight of this node and returns the exit code, which is the same on all nodes.

    Args:
        arguments: Command-line arguments; None reads them from ``sys.argv``.
    """
    given = _parser().parse_intermixed_args(arguments)
    try:
        launch = Launch.from_environment(os.environ)
        _check_one_task_per_node(launch, os.environ)
        _check_rollout_nodes(launch, given.rollout_nodes)
    except ValueError as error:
        print(f"fipo preflight: {error}", file=sys.stderr)
        return REFUSED
    name = own_name(os.environ)
    try:
        gathering = Gathering(launch, given.port or gathering_port(launch), given.timeout)
        gathering.start(name)
        config, problem = _config(given)
        if launch.rank:
            return _other_node(gathering, launch, name, config or problem, given)
        problem = problem or _path_problem(given)
        if config is None or problem:
            print(problem, file=sys.stderr)
            gathering.announce("shared", "")
            return gathering.finish(REFUSED)
        return gathering.finish(_first_node(gathering, launch, name, config, given))
    except GatheringError as error:
        print(f"fipo preflight: {name}: {error}", file=sys.stderr)
        if not launch.rank:
            _write_lists(given, None, [name])
        return BAD


def _first_node(gathering: Gathering, launch: Launch, name: str, config: Config, given: argparse.Namespace) -> int:
    """Examines node 0, gathers the reports of all nodes, prints the table and returns the exit code."""
    shared = finished_in_time(lambda: SharedDirectory.choose(config, secrets.token_hex(8)), given.timeout)
    gathering.announce("shared", json.dumps(asdict(shared)) if shared else "")
    if shared is None:
        raise GatheringError(
            f"run.output = {config.run.output}: the file system has not answered in {given.timeout:g} s"
        )
    own_servers = 0 if given.rollout_nodes else server_gpus(config)
    memory = start_plan(config, launch.world_size - given.rollout_nodes, given.gpus_per_node, own_servers)
    with Greeter(name) as greeter, shared.cleaned(0):
        own = _examine(gathering, launch, name, config, shared, greeter, given)
        others = range(0 if own else 1, launch.world_size)
        nodes, absent = gathering.collect("node", others, NodeFacts.from_json)
        absent |= {} if own else {0: gathering.absent(0)}
        usable = [nodes[rank] for rank in sorted(nodes) if not nodes[rank].config_problem]
        gathering.announce("nodes", _NODES.dump_json(usable).decode())
        if own:
            _examine_neighbours(gathering, own, usable, shared, given)
        present = [node.rank for node in usable]
        neighbours, lost = gathering.collect("neighbours", present, NeighbourFacts.from_json)
    absent |= {rank: Absent(nodes[rank].name, "the other nodes") for rank in lost}
    plan = _all_reduce_plan(gathering, nodes, neighbours, absent, given)
    gathering.announce("all_reduce", plan.to_json() if plan else "")
    measured: Mapping[int, AllReduceFacts] = {}
    if plan:
        gathering.report("all_reduce", measure(plan, 0).to_json())
        measured, lost = gathering.collect("all_reduce", plan.processes, AllReduceFacts.from_json)
        absent |= {rank: Absent(nodes[rank].name, "the all-reduce") for rank in lost}
    names = _names(launch.world_size, nodes, absent)
    problems = tuple(unresolved_urls(config))
    expected = _expected(config, given, plan, memory)
    verdict = Verdict.of(Job(expected, names, nodes, absent, neighbours, measured, problems))
    print(verdict.table(), flush=True)
    _write_lists(given, verdict, verdict.bad_nodes)
    return verdict.code


def _other_node(
    gathering: Gathering, launch: Launch, name: str, config: Config | str, given: argparse.Namespace
) -> int:
    """Examines another node, or reports why it has no configuration; returns the exit code that node 0 has decided."""
    announced = gathering.announced("shared")
    if not announced:
        return gathering.finish(REFUSED)
    shared = SharedDirectory(**json.loads(announced))
    with Greeter(name) as greeter, shared.cleaned(launch.rank):
        if isinstance(config, str):
            gathering.report("node", NodeFacts(launch.rank, name, name, config_problem=config).to_json())
            return gathering.finish(BAD)
        own = _examine(gathering, launch, name, config, shared, greeter, given)
        everyone = _NODES.validate_json(gathering.announced("nodes"))
        if own:
            _examine_neighbours(gathering, own, everyone, shared, given)
        plan = gathering.announced("all_reduce")  # all nodes are examined by then
    if plan and launch.rank in (parsed := AllReducePlan.from_json(plan)).processes:
        gathering.report("all_reduce", measure(parsed, launch.rank).to_json())
    return gathering.finish(BAD)


def _examine(
    gathering: Gathering,
    launch: Launch,
    name: str,
    config: Config,
    shared: SharedDirectory,
    greeter: Greeter,
    given: argparse.Namespace,
) -> NodeFacts | None:
    """Examines this node and reports; returns None if that has not ended in time, and reports nothing."""
    own = finished_in_time(
        lambda: examine(
            config,
            launch,
            name,
            rollout_nodes=given.rollout_nodes,
            shared=shared,
            greeter_port=greeter.port,
            tell=gathering.tell,
        ),
        given.timeout,
    )
    if own:
        gathering.report("node", own.to_json())
    return own


def _examine_neighbours(
    gathering: Gathering,
    own: NodeFacts,
    everyone: Sequence[NodeFacts],
    shared: SharedDirectory,
    given: argparse.Namespace,
) -> None:
    """Examines the other nodes and reports, unless that has not ended in time."""
    facts = finished_in_time(lambda: examine_neighbours(own, everyone, shared.token), given.timeout)
    if facts:
        gathering.report("neighbours", facts.to_json())


def _check_one_task_per_node(launch: Launch, environment: Mapping[str, str]) -> None:
    """Raises ValueError if there are several tasks on a node."""
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NUM_NODES")
    if launch.local_rank or ("RANK" not in environment and nodes is not None and tasks != nodes):
        found = f"{tasks} tasks on {nodes} nodes" if nodes is not None else f"local rank {launch.local_rank}"
        raise ValueError(f"{found}: a preflight has one task per node; use srun --ntasks-per-node=1")


def _check_rollout_nodes(launch: Launch, count: int) -> None:
    """Raises ValueError if the trainer is left without a node."""
    if not 0 <= count < launch.world_size:
        raise ValueError(f"--rollout-nodes {count}: must be at least 0 and less than {launch.world_size}, all nodes")


def _config(given: argparse.Namespace) -> tuple[Config | None, str]:
    try:
        return load_config(given.config, given.override), ""
    except ConfigError as error:
        return None, str(error)


def _all_reduce_plan(
    gathering: Gathering,
    nodes: Mapping[int, NodeFacts],
    neighbours: Mapping[int, NeighbourFacts],
    absent: Mapping[int, Absent],
    given: argparse.Namespace,
) -> AllReducePlan | None:
    """Returns what is measured on the trainer's nodes; None if nodes are missing or cannot be connected to, or if there
    is one process."""
    trainer = {rank: nodes[rank] for rank in sorted(nodes) if not nodes[rank].serves}
    cuda = any(node.gpus.usable for node in trainer.values())
    minimum = _minimum(given, cuda=cuda)
    processes = {rank: node.gpus.usable if cuda else 1 for rank, node in trainer.items()}
    separate = any(facts.unreachable or facts.unresolved for facts in neighbours.values())
    unusable = any(node.config_problem for node in nodes.values())
    if minimum == 0 or absent or separate or unusable or 0 in processes.values() or sum(processes.values()) < 2:
        return None
    return AllReducePlan(processes, minimum, gathering.host, gathering.port, cuda, given.timeout)


def _minimum(given: argparse.Namespace, *, cuda: bool) -> float:
    if given.min_bandwidth is not None:
        return float(given.min_bandwidth)
    return _MIN_NCCL if cuda else _MIN_GLOO


def _expected(
    config: Config, given: argparse.Namespace, plan: AllReducePlan | None, memory: Future[PlannedMemory | None] | None
) -> Expected:
    return Expected(
        gpus_per_node=given.gpus_per_node,
        rollout_nodes=given.rollout_nodes,
        min_bandwidth=plan.minimum if plan else 0.0,
        max_clock_skew=given.max_clock_skew,
        seconds=given.timeout,
        parallel=config.actor.parallel,
        server_gpus=0 if given.rollout_nodes else server_gpus(config),
        memory=finished_plan(memory, given.timeout),
    )


def _names(count: int, nodes: Mapping[int, NodeFacts], absent: Mapping[int, Absent]) -> dict[int, str]:
    """Returns the name of every node: as it has given it itself, else as Slurm's node list has it."""
    listed = names_of_ranks(os.environ, count)
    own = {rank: node.name for rank, node in nodes.items()}
    own |= {rank: one.started for rank, one in absent.items() if one.started}
    names = {rank: own.get(rank) or listed.get(rank) or f"rank-{rank}" for rank in range(count)}
    often = {name for name, number in Counter(names.values()).items() if number > 1}  # without Slurm, on one host
    return {rank: f"{name}-rank-{rank}" if name in often else name for rank, name in names.items()}


def _path_problem(given: argparse.Namespace) -> str:
    """Returns why the files that the arguments name cannot be written."""
    for option, path in (("--json", given.json), ("--exclude-file", given.exclude_file)):
        if path is not None and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            return (
                f"fipo preflight: {option} {path}: there is no directory {path.absolute().parent} that can be written"
            )
    return ""


def _write_lists(given: argparse.Namespace, verdict: Verdict | None, bad: Sequence[str]) -> None:
    """Writes the files that the arguments name."""
    if given.exclude_file:
        write_atomic(given.exclude_file, ",".join(bad) + "\n")
    if given.json and verdict:
        write_atomic(given.json, verdict.to_json())


def _number(least: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least:g}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo preflight",
        description="Examines the nodes of a job in seconds, before it starts. Run it with one task per node: "
        "srun --ntasks-per-node=1 fipo preflight CONFIG; or alone on one machine.",
        epilog="exit codes: 0 the job can start, 1 a node is bad, 2 wrong arguments or an invalid configuration",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="configuration of the run")
    parser.add_argument("override", nargs="*", metavar="key=value", help="changed values, as for fipo train")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="GPUs that every node must have (default: SLURM_GPUS_ON_NODE, else as many as most nodes have)",
    )
    parser.add_argument(
        "--rollout-nodes",
        type=int,
        default=0,
        metavar="N",
        help="how many nodes, the last ones, run servers alone (default: 0, servers share the trainer's nodes)",
    )
    parser.add_argument(
        "--min-bandwidth",
        type=_number(0),
        metavar="GB/S",
        help=f"bus bandwidth that an all-reduce must reach; 0 skips it (default: {_MIN_NCCL:g} with GPUs, "
        f"{_MIN_GLOO:g} without)",
    )
    parser.add_argument(
        "--max-clock-skew",
        type=_number(0),
        default=1.0,
        metavar="SECONDS",
        help="allowed difference of clocks (%(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=_number(1),
        default=60.0,
        metavar="SECONDS",
        help="time after which a node that has not reported is bad (%(default)g)",
    )
    parser.add_argument(
        "--port", type=int, metavar="PORT", help="port on node 0 for the reports (default: MASTER_PORT - 10000)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the results and all facts")
    parser.add_argument(
        "--exclude-file", type=Path, metavar="PATH", help="file for the bad nodes, in the form of sbatch --exclude"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
