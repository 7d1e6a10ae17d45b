"""Opens the engine of a run as configured: servers, clients and weight senders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fipo_megatron.config import Config, ServersConfig
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import EngineError, RolloutEngine
from fipo_megatron.rollout.host_address import LOOPBACK
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.control import BlockingControlClient
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, ServerGpus
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
        address: Address at which servers started here listen, and at which servers reach this rank.
        gpus: GPUs of the servers to start on this host; None without CUDA or without servers to start.
    """

    rank: int
    local_rank: int
    starters: tuple[int, ...]
    cuda: bool
    directory: Path
    address: str = LOOPBACK
    gpus: ServerGpus | None = None


@dataclass(frozen=True)
class OpenedEngine:
    """The engine of this rank, and the servers that it has started.

    Attributes:
        engine: Engine of this rank; None if the rank is not a leader.
        pool: Servers that this rank has started, or None.
        facts: Properties that every server reports, the same on every rank; empty without servers.
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


def embedded_device_problem(config: Config) -> str | None:
    """Returns why the embedded engine cannot run on its device; None if it can, or is not used."""
    rollout = config.rollout
    if rollout.engine == "embedded" and rollout.embedded_device == "cuda" and not torch.cuda.is_available():
        return "rollout.embedded_device = cuda: torch finds no GPU on this host; valid: cpu"
    return None


def embedded_settings(config: Config, local_rank: int = 0) -> dict[str, Any]:
    """Returns the arguments of :class:`.EmbeddedEngine` that a configuration sets.

    Args:
        config: Configuration of the run.
        local_rank: Number of this rank on its host, which is that of its GPU unless it sees one alone.

    Raises:
        EngineError: see :func:`embedded_device_problem`.
    """
    if problem := embedded_device_problem(config):
        raise EngineError(problem)
    device: str = config.rollout.embedded_device
    if device == "cuda":  # by number: the current device is that of a thread, and the engine has one of its own
        device = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    return {"slots": config.rollout.embedded_slots, "device": device}


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
        return OpenedEngine(await _open_embedded(config, host, coordinator))
    pool: ServerSupervisor | None = None
    error: Exception | None = None
    try:
        if not config.rollout.servers.urls and host.local_rank == 0:
            pool = ServerSupervisor(local_servers(config, host), restarts=_restarts(config.rollout.servers))
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
            # The order of the servers differs by leader, so that all servers are used.
            first = coordinator.leaders.index(coordinator.rank) % len(urls)
            client = _client(config, [*urls[first:], *urls[:first]], vocab)
            if pool is not None:
                pool.on_lost = client.worker_lost
            if coordinator.rank == 0:
                facts = await handshake(client, Path(config.model.path), tokenizer, longest=longest_request(config))
        reports = await coordinator.gather([asdict(each) for each in facts])
        facts = tuple(ServerFacts(**each) for each in reports[0])
    except BaseException as failed:
        coordinator.fail(failed)
        await OpenedEngine(client, pool).close()
        raise
    return OpenedEngine(client, pool, facts)


async def _open_embedded(config: Config, host: HostInfo, coordinator: StoreCoordinator) -> EmbeddedEngine | None:
    """Opens the embedded engine of a leader. A rank that cannot, such as one without a GPU, ends all ranks."""
    engine: EmbeddedEngine | None = None
    error: Exception | None = None
    try:
        settings = embedded_settings(config, host.local_rank)
        if coordinator.rank in coordinator.leaders:
            engine = EmbeddedEngine(config.model.path, **settings)
    except Exception as failed:
        error = failed
    await coordinator.gather({}, error)
    return engine


async def check_running_servers(config: Config, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Compares the servers of ``rollout.servers.urls`` with the model, before anything expensive is built.

    Raises:
        EngineError: a server cannot be reached, or serves another model; see :func:`.sglang.handshake.handshake`.
    """
    client = _client(config, config.rollout.servers.urls, vocab)
    try:
        await handshake(client, Path(config.model.path), tokenizer, longest=longest_request(config))
    finally:
        await client.close()


def _client(config: Config, urls: Sequence[str], vocab: int) -> SglangClient:
    servers = config.rollout.servers
    return SglangClient(
        urls,
        router=servers.router,
        context=longest_request(config),
        vocab=vocab,
        api_key=api_key(config),
        concurrency=servers.concurrency,
        progress_seconds=servers.progress_seconds,
        patience_seconds=servers.patience_seconds,
        deterministic=bool(config.rollout.sglang.get("enable_deterministic_inference")),
    )


def _restarts(servers: ServersConfig) -> int:
    """Returns the most restarts of a server; a colocated one would be sized for the memory that the actor leaves."""
    return 0 if servers.colocated else servers.restarts


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
    environment = dict(servers.environment)
    if host.gpus is not None and host.gpus.visible is not None:
        environment[VISIBLE] = host.gpus.visible
    found = []
    for number in range(servers.per_host):
        arguments: dict[str, Any] = given | ({"base_gpu_id": host.gpus.first[number]} if host.gpus else {})
        found.append(
            SglangServer(
                ServerSpec(
                    python=Path(servers.python),
                    model_path=Path(config.model.path),
                    log=host.directory / f"sglang-{host.rank}-{number}.log",
                    arguments=arguments,
                    environment=environment,
                    host=host.address,
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
        ranks = {facts.url: facts.ranks for facts in opened.facts}
        return _server_sender(config, servers, [ranks[url] for url in servers.urls], actor, host)
    except BaseException:
        servers.close()
        raise


def _server_sender(
    config: Config, servers: BlockingControlClient, ranks: Sequence[int], actor: ActorWeights, host: HostInfo
) -> DiskSender | TensorSender | DistributedSender:
    if config.rollout.servers.sync == "disk":
        return DiskSender(actor, servers, host.directory)
    if config.rollout.servers.sync == "tensor":
        return TensorSender(actor, servers, ranks)
    return DistributedSender(
        actor,
        servers,
        ranks,
        address=host.address,
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
