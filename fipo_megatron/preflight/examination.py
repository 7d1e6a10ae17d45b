"""The examination of a node by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import Config
from fipo_megatron.preflight.gpu_state import gpu_facts
from fipo_megatron.preflight.input_access import existing_directory, free_bytes, input_facts, needed_bytes
from fipo_megatron.preflight.installed_versions import server_versions, trainer_versions
from fipo_megatron.preflight.node_facts import NodeFacts
from fipo_megatron.preflight.port_state import port_states
from fipo_megatron.preflight.time_limit import finished_in_time
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.host_address import host_address, is_loopback
from fipo_megatron.storage.output_directory import output_problems

_REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class SharedDirectory:
    """The directory in which all nodes write a file. Node 0 chooses it.

    Attributes:
        path: ``run.output``, or the nearest directory above it that exists on node 0.
        token: Content of the files, different for each preflight.
        problem: Why ``run.output`` cannot be used on node 0; empty if it can.
    """

    path: str
    token: str
    problem: str = ""

    @classmethod
    def choose(cls, config: Config, token: str) -> SharedDirectory:
        """Chooses the directory; to be called on node 0 before any node writes there."""
        output = Path(config.run.output)
        problem = "; ".join(output_problems(output, config.checkpoint.resume))
        return cls(str(existing_directory(output)), token, problem)

    def file(self, rank: int) -> Path:
        """Returns the file of a node."""
        return Path(self.path) / f".fipo-preflight-{self.token}-{rank}"

    def write(self, rank: int) -> str:
        """Writes the file of a node under another name and renames it; returns why that fails, else an empty text."""
        target = self.file(rank)
        partial = target.with_name(f"{target.name}.partial")
        try:
            with partial.open("w") as opened:
                opened.write(self.token)
                opened.flush()
                os.fsync(opened.fileno())
            partial.rename(target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            return f"{self.path}: cannot be written: {error.strerror}"
        return ""

    @contextmanager
    def cleaned(self, rank: int) -> Iterator[None]:
        """Removes the file of a node at the end of the block, if it is there and the file system answers."""

        def remove() -> bool:
            with suppress(OSError):
                self.file(rank).unlink()
            return True

        try:
            yield
        finally:
            finished_in_time(remove, _REMOVE_SECONDS)


def examine(
    config: Config,
    launch: Launch,
    name: str,
    *,
    rollout_nodes: int,
    shared: SharedDirectory,
    greeter_port: int,
    tell: Callable[[str], None],
) -> NodeFacts:
    """Examines this node; writes its file to the shared directory.

    Args:
        config: Configuration of the run.
        launch: Position of this node.
        name: Name of this node.
        rollout_nodes: Number of nodes that run servers alone, the last ones. With any, the others run no servers.
        shared: Directory chosen by node 0.
        greeter_port: Port at which this node answers others.
        tell: Function that is given the name of each part before it is examined: a part may not come to an end.
    """
    host = socket.gethostname()
    serves = launch.rank >= launch.world_size - rollout_nodes
    tell("its GPUs")
    gpus = gpu_facts()
    tell("its packages")
    versions = trainer_versions()
    tell("SGLang's environment")
    theirs, server_problem = server_versions(config) if serves or not rollout_nodes else ({}, "")
    tell("host name and ports")
    name_problem = _name_problem(config, serves=serves) if launch.world_size > 1 else ""
    ports, port_problems = port_states(config, launch, host)
    tell(f"model and data ({config.model.path})")
    inputs = input_facts(config, model_alone=serves)
    tell(f"the output directory ({shared.path})")
    written = shared.write(launch.rank)
    output_problem = (
        shared.problem if launch.rank == 0 and shared.problem else f"run.output: {written}" if written else ""
    )
    return NodeFacts(
        rank=launch.rank,
        name=name,
        host=host,
        greeter_port=greeter_port,
        serves=serves,
        gpus=gpus,
        versions=versions,
        server_versions=theirs,
        server_problem=server_problem,
        name_problem=name_problem,
        output_file="" if written else str(shared.file(launch.rank)),
        output_problem=output_problem,
        inputs=inputs,
        free_bytes=free_bytes(Path(shared.path)),
        needed_bytes=needed_bytes(config),
        ports=ports,
        port_problems=port_problems,
    )


def _name_problem(config: Config, *, serves: bool) -> str:
    """Returns why other hosts could not reach this one under the addresses that gloo and servers will use."""
    if not serves and "GLOO_SOCKET_IFNAME" not in os.environ:
        host = socket.gethostname()
        valid = "it must resolve to an address that the other nodes reach, or GLOO_SOCKET_IFNAME must name an interface"
        try:
            address = socket.gethostbyname(host)
        except OSError as error:
            return f"the own host name {host} cannot be resolved ({error.strerror}); {valid}"
        if is_loopback(address):
            return f"the own host name {host} resolves to {address}; {valid}"
    if config.algorithm.kind != "sft" and config.rollout.engine == "sglang" and not config.rollout.servers.urls:
        try:
            host_address(config.rollout.servers.interface)
        except EngineError as error:
            return str(error)
    return ""
