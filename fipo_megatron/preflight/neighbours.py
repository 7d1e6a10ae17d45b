"""Examines the other nodes from one node: names, connections, clocks and files in the shared output directory."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fipo_megatron.preflight.greeter import Greeting, greet
from fipo_megatron.preflight.node_facts import NeighbourFacts, NodeFacts

_VISIBLE_SECONDS = 10.0
"""Seconds within which a renamed file must be visible on other nodes; NFS keeps attributes for some seconds."""
_CLOCK_ROUNDS = 5


def examine_neighbours(own: NodeFacts, everyone: Sequence[NodeFacts], token: str) -> NeighbourFacts:
    """Examines all other nodes from this one.

    Args:
        own: This node.
        everyone: All nodes that have reported.
        token: Content of the files of this preflight.
    """
    others = [node for node in everyone if node.rank != own.rank]
    if not others:
        return NeighbourFacts(clock_ahead=0.0)
    with ThreadPoolExecutor(max_workers=min(32, len(others))) as threads:
        connections = list(threads.map(_connect, others))
    unresolved = {node.rank: error for node, (kind, error) in zip(others, connections, strict=True) if kind == "name"}
    unreachable = {
        node.rank: error for node, (kind, error) in zip(others, connections, strict=True) if kind == "connection"
    }
    ahead, error = _clock(own, others, {*unresolved, *unreachable})
    return NeighbourFacts(unresolved, unreachable, _invisible(others, token), ahead, error)


def _connect(node: NodeFacts) -> tuple[str, str]:
    """Returns what does not work, the name or the connection, and why; empty texts if both do."""
    try:
        address = socket.gethostbyname(node.host)
    except OSError as error:
        return "name", f"the host name {node.host} cannot be resolved ({error.strerror or error})"
    where = f"port {node.greeter_port} of {node.host} ({address})"
    try:
        answered = greet(address, node.greeter_port).name
    except (OSError, ValueError) as error:
        return "connection", f"{where}: {error}"
    if answered != node.name:
        return "name", f"the host name {node.host} resolves to {address}, which is {answered}"
    return "", ""


def _clock(own: NodeFacts, others: Sequence[NodeFacts], failed: set[int]) -> tuple[float | None, float]:
    """Returns the difference to the clock of node 0 and its error, from the fastest of some round trips."""
    if own.rank == 0:
        return 0.0, 0.0
    first = next((node for node in others if node.rank == 0), None)
    if first is None or first.rank in failed:
        return None, 0.0
    rounds: list[Greeting] = []
    try:
        for _ in range(_CLOCK_ROUNDS):
            rounds.append(greet(first.host, first.greeter_port))
    except (OSError, ValueError):
        return None, 0.0
    best = min(rounds, key=lambda one: one.error)
    return best.ahead, best.error


def _invisible(others: Sequence[NodeFacts], token: str) -> dict[int, str]:
    """Returns why files of other nodes cannot be read here, by rank. Waits some seconds for those that are missing."""
    end = time.monotonic() + _VISIBLE_SECONDS
    waiting = {node.rank: Path(node.output_file) for node in others if node.output_file}
    while True:
        problems = {rank: problem for rank, path in waiting.items() if (problem := _read(path, token))}
        if not problems or time.monotonic() > end:
            return problems
        waiting = {rank: waiting[rank] for rank in problems}
        time.sleep(0.2)


def _read(path: Path, token: str) -> str:
    try:
        return "" if path.read_text() == token else f"{path} has another content"
    except OSError as error:
        return f"{path}: {error.strerror}"
