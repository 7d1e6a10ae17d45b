"""Opens the engine of a run as configured: servers, clients and weight senders."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fipo_megatron.config import Config
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import RolloutEngine
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.sglang.handshake import ServerFacts, handshake
from fipo_megatron.rollout.sglang.server import ServerSpec, SglangServer
from fipo_megatron.rollout.sglang.server_supervisor import ServerSupervisor
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.distributed_sender import DistributedSender
from fipo_megatron.rollout.weight_sync.embedded_sender import EmbeddedSender
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights, WeightSender
from fipo_megatron.rollout.weight_sync.tensor_sender import TensorSender


@dataclass(frozen=True)
class HostInfo:
    """Position of this rank among ranks and hosts.

    Attributes:
        rank: Global rank.
        local_rank: Rank on this host; local rank 0 starts the servers of the host.
        starters: First rank of each host.
        cuda: Whether servers have GPUs.
        directory: Directory for weights in transfer and server logs; all ranks and the servers started here see it.
    """

    rank: int
    local_rank: int
    starters: tuple[int, ...]
    cuda: bool
    directory: Path


@dataclass(frozen=True)
class OpenedEngine:
    """The engine of this rank, and the servers that it has started.

    Attributes:
        engine: Engine of this rank; None if the rank is not a leader.
        pool: Servers that this rank has started, or None.
        facts: Properties that every server reports; empty without servers and on other ranks than 0.
    """

    engine: RolloutEngine | None
    pool: ServerSupervisor | None = None
    facts: tuple[ServerFacts, ...] = ()

    async def close(self) -> None:
        """Closes the engine, then stops the servers that were started."""
        if self.engine is not None:
            await self.engine.close()
        if self.pool is not None:
            await self.pool.close()


def longest_request(config: Config) -> int:
    """Returns the tokens of the longest prompt with its response."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


async def open_engine(
    config: Config,
    host: HostInfo,
    coordinator: StoreCoordinator,
    everyone: StoreCoordinator,
    tokenizer: PreTrainedTokenizerBase,
    vocab: int,
) -> OpenedEngine:
    """Opens the engine of this rank; starts servers first if no URLs are configured. All ranks must call it.

    Args:
        config: Configuration of the run.
        host: Position of this rank.
        coordinator: Coordinator whose leaders have an engine.
        everyone: Coordinator whose leaders start servers (``host.starters``).
        tokenizer: Tokenizer of the model.
        vocab: Vocabulary size.

    Raises:
        EngineError: servers do not start, cannot be reached, or serve another model; or another rank failed.
        ValueError: the installed SGLang does not have an argument of ``rollout.sglang``.
    """
    leads = coordinator.rank in coordinator.leaders
    if config.rollout.engine == "embedded":
        engine = EmbeddedEngine(config.model.path, slots=config.rollout.embedded_slots) if leads else None
        await coordinator.gather({})
        return OpenedEngine(engine)
    pool: ServerSupervisor | None = None
    error: Exception | None = None
    try:
        if not config.rollout.servers.urls and host.local_rank == 0:
            pool = ServerSupervisor(local_servers(config, host), restarts=config.rollout.servers.restarts)
            async with everyone.alive():
                await pool.start()
    except Exception as failed:
        error = failed
    try:
        started = await everyone.gather(pool.urls if pool else (), error)
    except BaseException:
        await OpenedEngine(None, pool).close()
        raise
    urls = config.rollout.servers.urls or tuple(url for part in started for url in part)
    client: SglangClient | None = None
    facts: tuple[ServerFacts, ...] = ()
    try:
        if leads:
            client = _client(config, urls, coordinator, vocab)
            if pool is not None:
                pool.on_lost = client.worker_lost
            if coordinator.rank == 0:
                facts = await handshake(client, Path(config.model.path), tokenizer, longest=longest_request(config))
        await coordinator.gather({})
    except BaseException as failed:
        coordinator.fail(failed)
        await OpenedEngine(client, pool).close()
        raise
    return OpenedEngine(client, pool, facts)


def _client(config: Config, urls: Sequence[str], coordinator: StoreCoordinator, vocab: int) -> SglangClient:
    """Opens the client of a leader. The order of the servers differs by leader, so that all servers are used."""
    servers = config.rollout.servers
    first = coordinator.leaders.index(coordinator.rank) % len(urls)
    return SglangClient(
        [*urls[first:], *urls[:first]],
        router=servers.router,
        context=longest_request(config),
        vocab=vocab,
        api_key=api_key(config),
        concurrency=servers.concurrency,
        progress_seconds=servers.progress_seconds,
        patience_seconds=servers.patience_seconds,
        deterministic=bool(config.rollout.sglang.get("enable_deterministic_inference")),
    )


def api_key(config: Config) -> str | None:
    """Returns the API key of the servers from the environment, or None."""
    return os.environ.get(config.rollout.servers.api_key_variable)


def local_servers(config: Config, host: HostInfo) -> list[SglangServer]:
    """Returns the servers of this host, not started; each has the next GPUs of the host."""
    servers, given = config.rollout.servers, dict(config.rollout.sglang)
    given.setdefault("context_length", longest_request(config) + 8)
    given.setdefault("dtype", config.actor.dtype)
    if servers.colocated:
        given.setdefault("enable_memory_saver", True)
    if (key := api_key(config)) is not None:
        given["api_key"] = key
    ranks = int(given.get("tp_size", 1))
    alone = len(host.starters) == 1
    found = []
    for number in range(servers.per_host):
        arguments: dict[str, Any] = given | ({"base_gpu_id": number * ranks} if host.cuda else {})
        found.append(
            SglangServer(
                ServerSpec(
                    python=Path(servers.python),
                    model_path=Path(config.model.path),
                    log=host.directory / f"sglang-{host.rank}-{number}.log",
                    arguments=arguments,
                    host="127.0.0.1" if alone else socket.gethostname(),
                    cpu=not host.cuda,
                    ready_seconds=servers.ready_seconds,
                )
            )
        )
    return found


def open_sender(
    config: Config,
    opened: OpenedEngine,
    urls: Sequence[str],
    actor: ActorWeights,
    leaders: Sequence[int],
    host: HostInfo,
) -> WeightSender:
    """Opens the configured sender of the actor's weights. All ranks must call it.

    Args:
        config: Configuration of the run.
        opened: Engine of this rank.
        urls: URLs of the servers; the same on every rank.
        actor: The actor's weights on this rank.
        leaders: Ranks with an engine.
        host: Position of this rank.

    Raises:
        EngineError: a server refused to connect or cannot be reached.
        RuntimeError: another rank failed.
    """
    engine = opened.engine
    if config.rollout.engine == "embedded":
        assert engine is None or isinstance(engine, EmbeddedEngine)
        return EmbeddedSender(actor, engine, leaders, host.directory)
    servers = BlockingControlClient(urls, api_key(config))
    try:
        return _server_sender(config, servers, actor, host)
    except BaseException:
        servers.close()
        raise


def _server_sender(
    config: Config, servers: BlockingControlClient, actor: ActorWeights, host: HostInfo
) -> DiskSender | TensorSender | DistributedSender:
    ranks = int(config.rollout.sglang.get("tp_size", 1))
    if config.rollout.servers.sync == "disk":
        return DiskSender(actor, servers, host.directory)
    if config.rollout.servers.sync == "tensor":
        return TensorSender(actor, servers, ranks)
    return DistributedSender(
        actor,
        servers,
        [ranks] * len(servers.urls),
        address="127.0.0.1" if len(host.starters) == 1 and not config.rollout.servers.urls else socket.gethostname(),
        backend="nccl" if host.cuda else "gloo",
        timeout=timedelta(seconds=config.rollout.servers.patience_seconds),
    )


def context_problem(config: Config, tokens: int) -> str | None:
    """Returns why a model's context of ``tokens`` is too short for the configuration; None if it is long enough."""
    longest = longest_request(config)
    if longest <= tokens:
        return None
    return (
        f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}: must be at most the model's context, "
        f"max_position_embeddings = {tokens} in its config.json"
    )
