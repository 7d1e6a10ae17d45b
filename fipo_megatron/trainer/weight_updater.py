"""Sends the actor's weights to the rollout engine of a run, and checks that the engine serves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import chunk_owners, export_hf, save_hf
from fipo_megatron.actor.mismatch import max_log_prob_difference
from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine, open_sender
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.probe import check_probe, sample_probe
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights, WeightSender
from fipo_megatron.weights.architecture import Architecture


def actor_weights(actor: MegatronActor, architecture: Architecture, config: Config) -> ActorWeights:
    """Returns what a weight sender needs of the actor on this rank."""
    layout, chunks = actor.layout, actor.chunks
    bucket = config.rollout.servers.bucket_mib << 20
    return ActorWeights(
        stage=layout.pipeline_rank,
        stages=layout.pipeline_size,
        rank=layout.rank,
        senders=tuple(sorted({*chunk_owners(chunks, layout).values()})),
        stream=lambda ranks: export_hf(chunks, architecture, layout, bucket_bytes=bucket, on_ranks=ranks),
        save=lambda target: save_hf(chunks, architecture, layout, config.model.path, target),
        together=raise_on_all_ranks,
    )


class WeightUpdater:
    """Updates the engine's weights. Every rank makes the same calls in the same order.

    Args:
        config: Configuration of the run.
        actor: The policy on this rank.
        architecture: Architecture of the model.
        host: Host of this rank.
        opened: Engine of this rank.
        coordinator: Coordinator of the leaders.
        loop: Event loop of the engine.
        probe: Prompt that is sampled after each update to compare log-probs.

    Attributes:
        version: Weight version that the engine serves: the number of the step that sampled with it.
    """

    def __init__(
        self,
        config: Config,
        actor: MegatronActor,
        architecture: Architecture,
        host: HostInfo,
        opened: OpenedEngine,
        coordinator: StoreCoordinator,
        loop: EventLoopThread,
        probe: Prompt,
    ) -> None:
        self._config, self._actor, self._host, self._probe = config, actor, host, probe
        self._opened, self._coordinator, self._loop = opened, coordinator, loop
        self._actor_weights = actor_weights(actor, architecture, config)
        self._sender: WeightSender | None = None
        self._servers: tuple[tuple[str, ...], int] = ((), 0)
        self.version = 0

    def send(self, version: int) -> None:
        """Sends the actor's weights to every server that answers, also to those that were restarted.

        Raises:
            EngineError: The weights did not arrive; see :mod:`.rollout.weight_sync`.
        """
        urls, _ = now = self.reachable()
        if self._sender is None or now != self._servers:
            # A restarted server has forgotten the broadcast group, so a new one is needed.
            if self._sender is not None:
                self._sender.close()
            self._servers = now
            leaders = self._coordinator.leaders
            self._sender = open_sender(self._config, self._opened, urls, self._actor_weights, leaders, self._host)
        self._sender.send(version)
        self.version = version
        if (client := self._client) is not None:
            client.expect_version(version)
            for url in urls:
                client.worker_returned(url)
            if self._coordinator.rank == 0 and isinstance(self._sender, DiskSender):
                client.on_returned = self._send_latest

    def reachable(self) -> tuple[tuple[str, ...], int]:
        """Returns the servers that answer and how often any was lost, as rank 0 sees it; the same on every rank."""

        async def ask() -> tuple[tuple[str, ...], int]:
            client = self._client
            report: dict[str, Any] = {"urls": (), "losses": 0}
            if client is not None and self._coordinator.rank == 0:
                report = {"urls": await client.reachable(), "losses": client.losses}
            found = (await self._coordinator.gather(report))[0]
            return tuple(found["urls"]), found["losses"]

        return self._loop.run(ask())

    def sample_probe(self) -> Trajectory | None:
        """Samples a response to the probe prompt and returns it on every rank; None if no probe is configured.

        Raises:
            EngineError: The engine cannot answer, or answers with other weights.
        """
        rollout = self._config.rollout
        tokens = min(rollout.servers.probe_tokens, rollout.max_response_tokens)
        if rollout.engine == "embedded" or not tokens:
            return None

        async def ask() -> Mapping[str, list[float]]:
            found, error = None, None
            try:
                if self._coordinator.rank == 0:
                    engine = self._opened.engine
                    assert engine is not None
                    one = await sample_probe(engine, self._probe, tokens, rollout.temperature, self.version)
                    found = {"tokens": one.tokens.tolist(), "log_probs": one.behaviour_log_probs.tolist()}
            except Exception as failed:
                error = failed
            answer: Mapping[str, list[float]] = (await self._coordinator.gather(found, error))[0]
            return answer

        found = self._loop.run(ask())
        return Trajectory(
            prompt=self._probe,
            sample=0,
            tokens=np.array(found["tokens"], np.int32),
            behaviour_log_probs=np.array(found["log_probs"], np.float32),
            mask=np.ones(len(found["tokens"]), np.bool_),
            advantage=0.0,
        )

    def check_probe(self, response: Trajectory | None) -> None:
        """Compares the engine's log-probs of a probe response with the actor's.

        Raises:
            EngineError: They differ by more than ``rollout.servers.max_probe_shift``.
        """
        if response is None:
            return
        plan = self._actor.plan([len(response)], [[0]])
        log_probs = self._actor.log_probs(plan, [response])
        difference = max_log_prob_difference(self._actor, plan, [response], log_probs)
        check_probe(difference, self.version, self._config.rollout.servers.max_probe_shift)

    def close(self) -> None:
        """Disconnects from the servers."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    @property
    def _client(self) -> SglangClient | None:
        return self._opened.engine if isinstance(self._opened.engine, SglangClient) else None

    async def _send_latest(self, url: str) -> None:
        """Sends the latest weights to a server that was restarted; the disk still holds them."""
        assert self._client is not None
        if not isinstance(self._sender, DiskSender) or self._sender.latest is None:
            raise EngineError(f"{url}: is back before any weights were written; the next update sends them")
        payload = {"model_path": str(self._sender.latest), "weight_version": str(self.version)}
        await self._client.control("/update_weights_from_disk", payload, workers=[url])
