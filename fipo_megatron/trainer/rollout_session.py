"""The rollout side of a run on one rank: engine, sampler, weights, and who has the device when.

Where engine and actor share GPUs (``rollout.servers.colocated``), :meth:`RolloutSession.generating` is the hand-over:
optimizer and gradients leave, the engine's weights come back and are updated, the actor's weights leave, the KV cache
comes back; after the block all of it the other way round. Elsewhere it only sends the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import chunk_owners, export_hf, save_hf
from fipo_megatron.actor.mismatch import max_log_prob_difference
from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.carry_over import Carried
from fipo_megatron.rollout.engine import EngineError, EngineMemory, RolloutEngine, SamplingParameters
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine, open_engine, open_sender
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sampler import SampledGroups, Sampler, SamplerSettings, Scorer
from fipo_megatron.rollout.sampling_progress import ProgressSnapshot, combine_snapshots
from fipo_megatron.rollout.scatter import Routes
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.rollout.weight_sync.disk_sender import DiskSender
from fipo_megatron.rollout.weight_sync.probe import check_probe, sample_probe
from fipo_megatron.rollout.weight_sync.sender import ActorWeights, WeightSender
from fipo_megatron.weights.architecture import Architecture

logger = logging.getLogger(__name__)
T = TypeVar("T")


def actor_weights(actor: MegatronActor, architecture: Architecture, config: Config) -> ActorWeights:
    """What a sender has to know of the actor on this rank."""
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


def sampler_settings(config: Config, stop_token_ids: Sequence[int]) -> SamplerSettings:
    """Of the configuration; responses end with one of these tokens."""
    rollout = config.rollout
    return SamplerSettings(
        prompts_per_step=rollout.prompts_per_step,
        samples_per_prompt=rollout.samples_per_prompt,
        sampling=SamplingParameters(
            rollout.temperature, rollout.max_response_tokens, rollout.top_p, tuple(stop_token_ids)
        ),
        run_seed=config.seed,
        dynamic_sampling=config.algorithm.dynamic_sampling,
        max_batches=rollout.max_generation_batches,
        over_sampling=rollout.over_sampling,
        max_staleness=rollout.max_staleness - rollout.overlap,  # when they are sampled; learned from one version later
        on_exhausted=rollout.on_exhausted,
    )


class RolloutSession:
    """Every rank makes the same calls in the same order.

    Args:
        config: Of the run.
        actor: Of this rank.
        architecture: Of the model.
        host: Where this rank is.
        store: Of all ranks (:func:`.actor.parallel.store`).
        tokenizer: Of the model.
        scorer: Scores responses.
        stop_token_ids: Responses end with one of these.
        probe: What is asked after each update of the weights.

    Attributes:
        version: Of the engine's weights.

    Raises:
        EngineError: the engine does not start, or serves something else.
    """

    def __init__(
        self,
        config: Config,
        actor: MegatronActor,
        architecture: Architecture,
        host: HostInfo,
        store: dist.Store,
        *,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        stop_token_ids: Sequence[int],
        probe: Prompt,
    ) -> None:
        self._config, self._actor, self._host, self._probe = config, actor, host, probe
        self.routes = Routes.build(actor.layout.data_rank)
        silence = config.rollout.silence_seconds
        ranks = actor.layout.world_size
        self.coordinator = StoreCoordinator(store, host.rank, self.routes.leaders, ranks, silence_seconds=silence)
        hosts = dist.PrefixStore("hosts", store)
        starters = StoreCoordinator(hosts, host.rank, host.starters, ranks, silence_seconds=silence)
        self._background = EventLoopThread()
        self._opened: OpenedEngine = self._background.run(
            open_engine(config, host, self.coordinator, starters, tokenizer, architecture.vocab)
        )
        self._side = actor_weights(actor, architecture, config)
        self._sender: WeightSender | None = None
        self._servers: tuple[tuple[str, ...], int] = ((), 0)
        self.version = 0
        self._engine_has_memory = True
        self._ahead: Future[SampledGroups] | None = None
        self.sampler = Sampler(self._opened.engine, sampler_settings(config, stop_token_ids), scorer, self.coordinator)

    def sample(self, next_prompts: Callable[[int], Sequence[Prompt]]) -> SampledGroups:
        """The groups of a step; within :meth:`generating`.

        Raises:
            EngineError: no server is left, or another rank failed; what was sampled so far is carried.
            SamplingExhaustedError: see :class:`.rollout.sampler.Sampler`.
        """
        try:
            return self._background.run(self.sampler.step(next_prompts, self.version))
        except EngineError as error:
            # Servers that were started again need weights, which only all ranks together can send.
            if self._config.rollout.servers.colocated or not self._reachable()[0]:
                raise
            logger.warning("%s\nthe weights are sent again", error)
        self.send(self.version)
        return self._background.run(self.sampler.step(next_prompts, self.version))

    def prefetch(self, next_prompts: Callable[[int], Sequence[Prompt]]) -> None:
        """Begins to sample the groups of the next step, with the weights that the engine has now."""
        self._ahead = self._background.begin(self.sampler.step(next_prompts, self.version))

    def wait_prefetched(self) -> SampledGroups | None:
        """Waits for what :meth:`prefetch` began; None where nothing was. What is carried can be saved then.

        Raises:
            EngineError: and SamplingExhaustedError, as :meth:`sample`; what was sampled so far is carried.
        """
        return self._ahead.result() if self._ahead is not None else None

    def take_prefetched(self) -> SampledGroups | None:
        """As :meth:`wait_prefetched`, once."""
        try:
            return self.wait_prefetched()
        finally:
            self._ahead = None

    def abandon(self) -> None:
        """Ends what :meth:`prefetch` began, where it is not over."""
        if self._ahead is not None:
            self._ahead.cancel()

    def restore_prefetched(self, sampled: SampledGroups) -> None:
        """Goes on with what :meth:`wait_prefetched` gave in an earlier process."""
        self._ahead = Future()
        self._ahead.set_result(sampled)

    def progress(self) -> ProgressSnapshot:
        """How far all leaders are, as rank 0 knows; from any thread."""
        others = self.coordinator.others() if len(self.coordinator.leaders) > 1 else {}
        seen = [tuple(one.values()) for rank, one in others.items() if rank != self.coordinator.rank and one]
        return combine_snapshots([self.sampler.progress.now(), *(ProgressSnapshot(*one) for one in seen)])

    @property
    def engine(self) -> RolloutEngine | None:
        """Of this rank; None where it does not lead."""
        return self._opened.engine

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it where the engine lives."""
        return self._background.run(work)

    def carried(self) -> Carried | None:
        """What the sampler of this rank carries; None where it does not lead."""
        return self.sampler.carried() if self.engine is not None else None

    def restore(self, carried: Sequence[Carried]) -> None:
        """Goes on with what each leader carried; with another number of leaders, it is shared anew.

        Args:
            carried: Of every leader then; the same on every rank.
        """
        if self.engine is None or not carried:
            return
        place, leaders = self.coordinator.leaders.index(self.coordinator.rank), len(self.coordinator.leaders)
        if len(carried) == leaders:
            self.sampler.restore(*carried[place])
            return
        groups = [group for one, _ in carried for group in one]
        unfinished = [prompt for _, one in carried for prompt in one]
        self.sampler.restore(groups[place::leaders], unfinished[place::leaders])

    def drop_carried(self) -> None:
        """Forgets what is carried."""
        self.sampler.restore((), ())

    @contextmanager
    def generating(self, version: int) -> Iterator[None]:
        """A block in which the engine samples with the actor's weights, as this version.

        Raises:
            EngineError: the weights did not get there; see :mod:`.rollout.weight_sync`.
        """
        if not self._config.rollout.servers.colocated:
            self.send(version)
            self._check(self._ask(), version)
            yield
            return
        actor = self._actor
        if self._engine_has_memory:  # as it is started
            self._give_back("kv_cache")
            self._give_back("weights")
        with actor.offloaded(parameters=False):
            self._take("weights")
            self.send(version)
            with actor.offloaded(gradients=False, optimizer=False):
                self._take("kv_cache")
                self._engine_has_memory = True
                answer = self._ask()
                yield
                self._give_back("kv_cache")
                self._give_back("weights")
                self._engine_has_memory = False
        self._check(answer, version)

    def send(self, version: int) -> None:
        """Gives the engine the actor's weights; servers that have come back get them, too."""
        urls, _ = now = self._reachable()
        if self._sender is None or now != self._servers:
            # One that was started again has forgotten the group of the broadcast.
            if self._sender is not None:
                self._sender.close()
            self._servers = now
            self._sender = open_sender(self._config, self._opened, urls, self._side, self.routes.leaders, self._host)
        self._sender.send(version)
        self.version = version
        if (client := self._client) is not None:
            client.expect_version(version)
            for url in urls:
                client.worker_returned(url)
            if self.coordinator.rank == 0 and isinstance(self._sender, DiskSender):
                client.on_returned = self._send_latest

    @property
    def _client(self) -> SglangClient | None:
        return self._opened.engine if isinstance(self._opened.engine, SglangClient) else None

    def _reachable(self) -> tuple[tuple[str, ...], int]:
        """Servers that answer, and how often any was lost, as rank 0 finds; the same on every rank."""

        async def ask() -> tuple[tuple[str, ...], int]:
            client, report = self._client, {"urls": (), "losses": 0}  # type: tuple[SglangClient | None, dict[str, Any]]
            if client is not None and self.coordinator.rank == 0:
                report = {"urls": await client.reachable(), "losses": client.losses}
            found = (await self.coordinator.gather(report))[0]
            return tuple(found["urls"]), found["losses"]

        return self._background.run(ask())

    async def _send_latest(self, url: str) -> None:
        """To a server that was started again."""
        assert isinstance(self._sender, DiskSender)
        assert self._client is not None
        payload = {"model_path": str(self._sender.latest), "weight_version": str(self.version)}
        await self._client.control("/update_weights_from_disk", payload, workers=[url])

    def _ask(self) -> Trajectory | None:
        """A response to the probe on every rank; None where none is asked for."""
        rollout = self._config.rollout
        tokens = min(rollout.servers.probe_tokens, rollout.max_response_tokens)
        if rollout.engine == "embedded" or not tokens:
            return None

        async def ask() -> list[Mapping[str, list[float]]]:
            found, error = None, None
            try:
                if self.coordinator.rank == 0:
                    engine = self._opened.engine
                    assert engine is not None
                    one = await sample_probe(engine, self._probe, tokens, rollout.temperature, self.version)
                    found = {"tokens": one.tokens.tolist(), "log_probs": one.behaviour_log_probs.tolist()}
            except Exception as failed:
                error = failed
            return await self.coordinator.gather(found, error)

        found = self._background.run(ask())[0]
        return Trajectory(
            prompt=self._probe,
            sample=0,
            tokens=np.array(found["tokens"], np.int32),
            behaviour_log_probs=np.array(found["log_probs"], np.float32),
            mask=np.ones(len(found["tokens"]), np.bool_),
            advantage=0.0,
        )

    def _check(self, answer: Trajectory | None, version: int) -> None:
        if answer is None:
            return
        plan = self._actor.plan([len(answer)], [[0]])
        difference = max_log_prob_difference(self._actor, plan, [answer], self._actor.log_probs(plan, [answer]))
        check_probe(difference, version, self._config.rollout.servers.max_probe_shift)

    def _take(self, what: EngineMemory) -> None:
        self._control(lambda engine: engine.restore_memory(what))

    def _give_back(self, what: EngineMemory) -> None:
        self._control(lambda engine: engine.release_memory(what))

    def _control(self, call: Callable[[RolloutEngine], Awaitable[None]]) -> None:
        """By the first leader; all ranks go on when it is done."""

        async def run() -> None:
            error: Exception | None = None
            try:
                if self.coordinator.rank == 0:
                    assert self._opened.engine is not None
                    async with self.coordinator.alive():
                        await call(self._opened.engine)
            except Exception as failed:
                error = failed
            await self.coordinator.gather({}, error)

        self._background.run(run())

    def close(self) -> None:
        """Ends the engine and its thread."""
        if self._sender is not None:
            self._sender.close()
        self._background.run(self._opened.close())
        self._background.close()
