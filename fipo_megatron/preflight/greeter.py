"""The greeter of a node: a port at which it tells its name and its clock to other nodes."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

_SECONDS = 3.0
"""Limit of one connection."""


@dataclass(frozen=True)
class Greeting:
    """The answer of a node.

    Attributes:
        name: Name of the node that answered.
        ahead: Seconds that this node's clock is ahead of the other's.
        error: Largest error of ``ahead``: half of the round trip, in seconds.
    """

    name: str
    ahead: float
    error: float


class Greeter:
    """Answers every connection with the node's name and its clock, in a thread of its own, while the block runs.

    Args:
        name: Name of the node.

    Attributes:
        port: Port at which it listens, on all interfaces. The system chooses it, as it does for NCCL, gloo and servers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._listener = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, name="greeter", daemon=True)

    def __enter__(self) -> Greeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the wait for a connection
        self._listener.close()
        self._thread.join(timeout=_SECONDS)

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError):
                connection.settimeout(_SECONDS)
                connection.recv(1)  # the other node measures the round trip from here
                connection.sendall(json.dumps({"name": self._name, "time": time.time()}).encode() + b"\n")


def greet(host: str, port: int) -> Greeting:
    """Connects to a greeter and compares clocks.

    Raises:
        OSError: There is no connection, or no answer in time.
        ValueError: Another program answers there.
    """
    with socket.create_connection((host, port), timeout=_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = time.monotonic()
        connection.sendall(b"?")
        answer = b""
        while not answer.endswith(b"\n") and (part := connection.recv(4096)):
            answer += part
        seconds = time.monotonic() - sent
        own = time.time() - seconds / 2
    try:
        values = json.loads(answer)
        return Greeting(str(values["name"]), own - float(values["time"]), seconds / 2)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"another program answers at port {port} of {host}") from None
