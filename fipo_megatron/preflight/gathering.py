"""The exchange between the nodes of a preflight, through a store that node 0 serves.

No process groups are involved, so that a node that is missing or hangs cannot keep the others from being examined.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from fipo_megatron.actor.launch import Launch

Facts = TypeVar("Facts")
_POLL_SECONDS = 0.05
_SMALLEST_PORT = 1024
_PORT_DISTANCE = 10000


class GatheringError(Exception):
    """The nodes cannot exchange anything; the message says why."""


@dataclass(frozen=True)
class Absent:
    """A node that has not reported in time.

    Attributes:
        started: Name that it gave when it started; empty if it has not started.
        part: The part that it examined last.
    """

    started: str = ""
    part: str = ""


def gathering_port(launch: Launch) -> int:
    """Returns the port at which node 0 gathers reports.

    It is not the port of the trainer's rank 0, which is to be examined, nor one that another job derives from its id.
    """
    if not launch.address:
        return 0  # one node alone: a free one
    below = launch.port - _PORT_DISTANCE
    return below if below > _SMALLEST_PORT else launch.port + _PORT_DISTANCE


class Gathering:
    """The exchange, from one node's point of view.

    Args:
        launch: Position of this node.
        port: Port at which node 0 gathers reports.
        seconds: Seconds that the nodes are waited for.

    Raises:
        GatheringError: The port is in use on node 0, or node 0 cannot be reached in time.
    """

    def __init__(self, launch: Launch, port: int, seconds: float) -> None:
        self._rank, self._nodes, self._seconds = launch.rank, launch.world_size, seconds
        self.host = launch.address or "127.0.0.1"
        first = launch.rank == 0
        try:
            socket.getaddrinfo(self.host, port)
        except OSError as error:
            raise GatheringError(
                f"MASTER_ADDR = {self.host}: cannot be resolved ({error.strerror}); it must be a name or an address of "
                "node 0 that every node knows"
            ) from None
        try:
            if not first:
                _wait_for_listener(self.host, port, seconds)
            self._store = dist.TCPStore(
                self.host,
                port,
                is_master=first,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (dist.DistError, ValueError, OSError) as error:
            if first:
                raise GatheringError(
                    f"port {port}, at which node 0 gathers the reports, cannot be used: {_first_line(error)}; choose "
                    "another one with --port"
                ) from None
            raise GatheringError(
                f"node 0 could not be reached at {self.host}, port {port}, within {seconds:g} s: it is missing, or a "
                "firewall closes the port"
            ) from None
        self.port: int = self._store.port

    def start(self, name: str) -> None:
        """Tells that this node has started."""
        self._store.set(f"started/{self._rank}", name)

    def tell(self, part: str) -> None:
        """Tells which part this node examines now."""
        self._store.set(f"part/{self._rank}", part)

    def announce(self, key: str, content: str) -> None:
        """Gives a text to all nodes; called on node 0."""
        self._store.set(key, content)

    def announced(self, key: str) -> str:
        """Returns what node 0 announces, and waits for it.

        Raises:
            GatheringError: It has not done so in time.
        """
        try:
            self._store.wait([key], timedelta(seconds=4 * self._seconds))  # node 0 itself waits in every phase
            return self._store.get(key).decode()
        except RuntimeError:
            raise GatheringError(f"node 0 has ended, or has not answered within {4 * self._seconds:g} s") from None

    def report(self, phase: str, content: bytes) -> None:
        """Reports what this node has found out in a phase."""
        self._store.set(f"{phase}/{self._rank}", content.decode())

    def collect(
        self, phase: str, ranks: Iterable[int], parse: Callable[[bytes], Facts]
    ) -> tuple[dict[int, Facts], dict[int, Absent]]:
        """Waits on node 0 for the reports of a phase.

        Args:
            phase: Name of the phase.
            ranks: Nodes that take part.
            parse: Reads a report.

        Returns:
            The reports, and the nodes that have not reported in time.
        """
        missing, end = set(ranks), time.monotonic() + self._seconds
        found: dict[int, Facts] = {}
        while missing:
            for rank in sorted(missing):
                if self._store.check([f"{phase}/{rank}"]):
                    found[rank] = parse(self._store.get(f"{phase}/{rank}"))
            missing -= found.keys()
            if missing and time.monotonic() > end:
                break
            if missing:
                time.sleep(_POLL_SECONDS)
        return found, {rank: self.absent(rank) for rank in missing}

    def absent(self, rank: int) -> Absent:
        """Returns what is known on node 0 about a node that has not reported."""
        return Absent(self._text(f"started/{rank}"), self._text(f"part/{rank}"))

    def finish(self, code: int) -> int:
        """Ends the preflight on all nodes with the same exit code, which node 0 decides; returns it.

        Node 0 serves the store, so it waits some seconds for the others to read the code.
        """
        if self._rank == 0:
            self.announce("code", json.dumps(code))
            self._seconds = min(self._seconds, 5.0)
            self.collect("ended", (rank for rank in range(1, self._nodes) if self._text(f"started/{rank}")), bytes)
            return code
        code = int(self.announced("code"))
        self.report("ended", b"yes")
        return code

    def _text(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _wait_for_listener(host: str, port: int, seconds: float) -> None:
    """Waits until something listens; torch's own wait prints its stack several times.

    Raises:
        OSError: Nothing listens in time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(4 * _POLL_SECONDS)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
