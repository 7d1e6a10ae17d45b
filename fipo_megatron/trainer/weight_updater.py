"""Sends the actor's weights to the rollout engine of a run, and checks that the engine serves them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import chunk_owners, export_hf, save_hf
from fipo_megatron.actor.mismatch import log_prob_differences
from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine, open_sender
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.probe import ProbeShift, check_probe, sample_probe
from fipo_megatron.rollout.weight_sync.sender_protocol import ActorWeights, WeightSender
from fipo_megatron.weights.architecture import Architecture

logger = logging.getLogger(__name__)


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
        probe: Prompts to which responses are sampled after each update to compare log-probs.

    Attributes:
        version: Weight version that the engine serves: the number of the step that sampled with it.
        probe_shift: Difference of engine and actor after the last update; None without a probe.
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
        probe: Sequence[Prompt],
    ) -> None:
        self._config, self._actor, self._host, self._probe = config, actor, host, tuple(probe)
        self._opened, self._coordinator, self._loop = opened, coordinator, loop
        self._actor_weights = actor_weights(actor, architecture, config)
        self._sender: WeightSender | None = None
        self._servers: tuple[tuple[str, ...], int] = ((), 0)
        self.version = 0
        self.probe_shift: ProbeShift | None = None

    def send(self, version: int) -> None:
        """Sends the actor's weights to every server that answers, also to those that were restarted.

        If a server is lost on the way, the weights are sent once more, to the servers that answer then.

        Raises:
            EngineError: The weights did not arrive; see :mod:`.rollout.weight_sync`.
        """
        now = self.reachable()
        try:
            self._send(version, now)
        except Exception as error:  # on all ranks: those that have not failed themselves raise RuntimeError
            self._abort_sender()
            rollout = self._config.rollout
            if rollout.engine == "embedded" or rollout.servers.colocated:  # a restarted server would need the memory
                raise
            now = self.reachable(rollout.servers.patience_seconds)
            if not now[0]:
                raise
            logger.warning("%s\nthe weights are sent again, to %s", error, ", ".join(now[0]))
            self._send(version, now)

    def _send(self, version: int, now: tuple[tuple[str, ...], int]) -> None:
        """Sends the weights to the servers that were found by :meth:`reachable`."""
        urls, _ = now
        if now != self._servers:
            self._abort_sender()  # a server that was lost is missing in the group; a restarted one has forgotten it
        if self._sender is None:
            self._servers = now
            leaders = self._coordinator.leaders
            self._sender = open_sender(self._config, self._opened, urls, self._actor_weights, leaders, self._host)
        self._sender.send(version)
        self.version = version
        if (client := self._client) is not None:
            client.expect_version(version)
            for url in client.pool.workers:
                if url in urls:
                    client.worker_returned(url)
                else:
                    client.worker_lost(url, f"did not answer when weights {version} were sent")
            if self._coordinator.rank == 0 and isinstance(self._sender, DiskSender):
                client.on_returned = self._send_latest

    def _abort_sender(self) -> None:
        if self._sender is not None:
            self._sender.abort()
            self._sender = None

    def reachable(self, patience_seconds: float = 0.0) -> tuple[tuple[str, ...], int]:
        """Returns the servers that answer and how often any was lost, as rank 0 sees it; the same on every rank.

        Args:
            patience_seconds: Seconds to wait for a first server while none answers.
        """

        async def ask() -> tuple[tuple[str, ...], int]:
            client = self._client
            report: dict[str, Any] = {"urls": (), "losses": 0}
            if client is not None and self._coordinator.rank == 0:
                async with self._coordinator.alive():
                    urls = await client.reachable(patience_seconds)
                report = {"urls": urls, "losses": client.losses}
            found = (await self._coordinator.gather(report))[0]
            return tuple(found["urls"]), found["losses"]

        return self._loop.run(ask())

    def sample_probe(self) -> list[Trajectory]:
        """Samples responses to the probe's prompts and returns them on every rank; empty if no probe is configured.

        Raises:
            EngineError: The engine cannot answer, or answers with other weights.
        """
        rollout = self._config.rollout
        tokens = min(rollout.servers.probe_tokens, rollout.max_response_tokens)
        if rollout.engine == "embedded" or not tokens:
            return []

        async def ask() -> list[Mapping[str, list[float]]]:
            found, error = None, None
            try:
                if self._coordinator.rank == 0:
                    engine = self._opened.engine
                    assert engine is not None
                    responses = await sample_probe(engine, self._probe, tokens, rollout.temperature, self.version)
                    found = [
                        {"tokens": one.tokens.tolist(), "log_probs": one.behaviour_log_probs.tolist()}
                        for one in responses
                    ]
            except Exception as failed:
                error = failed
            answer: list[Mapping[str, list[float]]] = (await self._coordinator.gather(found, error))[0]
            return answer

        return [
            Trajectory(
                prompt=prompt,
                sample=0,
                tokens=np.array(one["tokens"], np.int32),
                behaviour_log_probs=np.array(one["log_probs"], np.float32),
                mask=np.ones(len(one["tokens"]), np.bool_),
                advantage=0.0,
            )
            for prompt, one in zip(self._probe, self._loop.run(ask()), strict=True)
        ]

    def check_probe(self, responses: Sequence[Trajectory]) -> None:
        """Compares the engine's log-probs of the probe's responses with the actor's.

        Raises:
            EngineError: They differ by more than ``rollout.servers.max_probe_mean_shift`` or
                ``rollout.servers.max_probe_quantile_shift``.
        """
        if not responses:
            return
        plan = self._actor.plan([len(one) for one in responses], [range(len(responses))])
        log_probs = self._actor.log_probs(plan, responses)
        differences = log_prob_differences(self._actor, plan, responses, log_probs)
        servers = self._config.rollout.servers
        self.probe_shift = check_probe(
            differences,
            self.version,
            max_mean=servers.max_probe_mean_shift,
            max_quantile=servers.max_probe_quantile_shift,
        )

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
