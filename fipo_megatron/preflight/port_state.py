"""The ports that a run needs on this node."""

from __future__ import annotations

import errno
import http.client
import socket
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import Config
from fipo_megatron.rollout.host_address import is_loopback

_SECONDS = 2.0


def port_states(config: Config, launch: Launch, host: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the ports that the run needs here with their state, and a sentence for each that is taken.

    These are the port of rank 0, if this node starts it, and those of the servers in ``rollout.servers.urls`` whose
    host is this node. A server that answers already is fine.

    Args:
        config: Configuration of the run.
        launch: Position of this node.
        host: Name of this host.
    """
    states, problems = [], []
    if launch.serves_store and launch.port:
        state = _bind_error(launch.port)
        states.append(f"{launch.port} {state or 'free'}")
        if state:
            problems.append(
                f"MASTER_PORT = {launch.port}: is {state}; it must be free for rank 0, set another one on all nodes"
            )
    for url, parts in _own_urls(config, launch.rank, host):
        port = parts.port or 80
        state = "serves" if _serves(parts) else _bind_error(port) or "free"
        states.append(f"{port} {state}")
        if state not in ("free", "serves"):
            problems.append(
                f"rollout.servers.urls: {url}: the port is {state} and no server answers there; it must be free for "
                "the server, or a server must answer"
            )
    return tuple(states), tuple(problems)


def unresolved_urls(config: Config) -> list[str]:
    """Lists the hosts in ``rollout.servers.urls`` whose names cannot be resolved, a sentence each."""
    problems = []
    for url in config.rollout.servers.urls if config.rollout.engine == "sglang" else ():
        host = urlsplit(url).hostname or ""
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            problems.append(f"rollout.servers.urls: {url}: the host name cannot be resolved ({error.strerror})")
    return problems


def _own_urls(config: Config, rank: int, host: str) -> Iterator[tuple[str, SplitResult]]:
    """Yields the URLs whose host is this node; a loopback address is that of node 0."""
    for url in config.rollout.servers.urls if config.rollout.engine == "sglang" else ():
        parts = urlsplit(url)
        name = parts.hostname or ""
        if (is_loopback(name) and rank == 0) or (not is_loopback(name) and (name == host or _is_own(name))):
            yield url, parts


def _is_own(name: str) -> bool:
    """Returns whether a name resolves to an address of this host."""
    with suppress(OSError), socket.socket() as probe:
        probe.bind((socket.gethostbyname(name), 0))
        return True
    return False


def _bind_error(port: int) -> str:
    """Returns why nothing can listen at a port of this host; empty if something can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: an ended one does not count
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return ""


def _serves(parts: SplitResult) -> bool:
    """Returns whether a server answers requests at a URL."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
