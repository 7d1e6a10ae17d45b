"""Serves the model of a configuration with SGLang on one node of a Slurm job, as a step of its own.

python -m fipo_megatron.slurm.rollout_node DIRECTORY CONFIG.yaml [key=value ...]

Writes the URLs of its servers to DIRECTORY/NODE.urls as soon as they answer, and on GPUs the version of their NCCL to
DIRECTORY/NODE.nccl: the job script gives both to the trainer. Servers that end are restarted
(rollout.servers.restarts). A node that is started again serves under the same URLs.

Runs until the file DIRECTORY/stop exists. SIGTERM, SIGUSR1 and SIGUSR2 do not end it: Slurm sends them to all steps,
and the trainer needs the servers to finish its step. Exit code 1: a server did not start, or ended too often; 2: the
configuration is not valid.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import torch

from fipo_megatron.config import Config, load_config
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, local_servers
from fipo_megatron.rollout.host_address import host_address
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, place_servers
from fipo_megatron.rollout.sglang.nccl_version import server_version
from fipo_megatron.rollout.sglang.server import SglangServer
from fipo_megatron.rollout.sglang.server_supervisor import ServerSupervisor
from fipo_megatron.slurm.job_checks import rollout_node_problem, servers_per_node
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
_LOOK_SECONDS = 1.0


def servers_of_node(config: Config, directory: Path, node: str) -> list[SglangServer]:
    """Returns the servers of this node, not started: as many as its GPUs have room for, on CPU ``per_host``.

    Args:
        config: Configuration of the run.
        directory: Directory in which nodes write their URLs.
        node: Name of this node.

    Raises:
        EngineError: The node has too few GPUs, or no address for other nodes.
    """
    gpus = None
    cuda = torch.cuda.is_available()
    if cuda:
        found = torch.cuda.device_count()
        per_host = servers_per_node(config, found)
        if not per_host:
            raise EngineError(f"rollout.sglang.tp_size: must be at most {found}, the GPUs of node {node}")
        config = replace(
            config,
            rollout=replace(config.rollout, servers=replace(config.rollout.servers, per_host=per_host)),
        )
        gpus = place_servers(config.rollout, [], os.environ.get(VISIBLE))
    host = HostInfo(
        rank=0,
        local_rank=0,
        starters=(0,),
        cuda=cuda,
        directory=directory / node,
        address=host_address(config.rollout.servers.interface),
        gpus=gpus,
    )
    servers = local_servers(config, host)
    earlier = directory / f"{node}.urls"
    if earlier.exists():
        for server, url in zip(servers, earlier.read_text(encoding="utf-8").split(), strict=False):
            server.port = urlsplit(url).port or server.port
    return servers


async def serve(config: Config, directory: Path, node: str) -> None:
    """Starts the servers of this node, writes their URLs and keeps them up until ``DIRECTORY/stop`` exists.

    Raises:
        EngineError: A server did not start, or ended more often than ``rollout.servers.restarts``.
        ValueError: The installed SGLang does not have an argument of ``rollout.sglang``.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        asyncio.get_running_loop().add_signal_handler(signum, logger.warning, "%s: serves on", signum.name)
    if torch.cuda.is_available() and config.rollout.servers.sync == "distributed":
        write_atomic(directory / f"{node}.nccl", server_version(config) + "\n")
    servers = servers_of_node(config, directory, node)
    restarts = config.rollout.servers.restarts
    supervisor = ServerSupervisor(servers, restarts=restarts)
    await supervisor.start()
    try:
        write_atomic(directory / f"{node}.urls", "\n".join(supervisor.urls) + "\n")
        logger.info("serves at %s", ", ".join(supervisor.urls))
        while not (directory / "stop").exists():
            await asyncio.sleep(_LOOK_SECONDS)
            if lost := [server.url for server in servers if not server.alive and server.starts > restarts]:
                raise EngineError(f"{', '.join(lost)}: ended {restarts + 1} times; see the logs in {directory / node}")
    finally:
        await supervisor.close()


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    if len(arguments) < 2 or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    directory, node = Path(arguments[0]), os.environ.get("SLURMD_NODENAME", socket.gethostname())
    try:
        config = load_config(arguments[1], arguments[2:])
        if problem := rollout_node_problem(config):
            raise ValueError(problem)
        asyncio.run(serve(config, directory, node))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (EngineError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
