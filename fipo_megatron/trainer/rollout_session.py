"""The rollout side of a run on one rank: engine, sampler, prefetching, and the hand-over of a shared device.

If engine and actor share GPUs (``rollout.servers.colocated``), :meth:`RolloutSession.serving_weights` hands the device
over: optimizer and gradients leave, the engine's weights return and are updated, the actor's weights leave, the KV
cache and the CUDA graphs return; after the block, the same in reverse. Servers start while the actor is offloaded.
Otherwise it only sends the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.config import Config, RolloutConfig
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.rollout.carry_over import Carried
from fipo_megatron.rollout.engine import (
    EngineError,
    EngineMemory,
    PermanentEngineError,
    RolloutEngine,
    SamplingParameters,
)
from fipo_megatron.rollout.engine_factory import HostInfo, open_engine
from fipo_megatron.rollout.event_loop import EventLoopThread
from fipo_megatron.rollout.sampler import SampledGroups, Sampler, SamplingExhaustedError
from fipo_megatron.rollout.sampler_settings import PromptSource, SamplerSettings, Scorer
from fipo_megatron.rollout.sampling_progress import ProgressSnapshot, combine_snapshots
from fipo_megatron.rollout.scatter import Routes
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.trainer.weight_updater import WeightUpdater
from fipo_megatron.weights.architecture import Architecture

logger = logging.getLogger(__name__)
T = TypeVar("T")


def sampler_settings(config: Config, stop_token_ids: Sequence[int]) -> SamplerSettings:
    """Returns the sampler's settings from the configuration; ``stop_token_ids`` end a response."""
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
        # Prefetched responses age by one version before they are learned from.
        max_staleness=rollout.max_staleness - rollout.overlap,
        on_exhausted=rollout.on_exhausted,
        max_empty_steps=rollout.max_empty_steps,
        max_failure_fraction=config.reward.max_failure_fraction,
    )


class RolloutSession:
    """Samples the groups of each step. Every rank makes the same calls in the same order.

    Args:
        config: Configuration of the run.
        actor: The policy on this rank.
        architecture: Architecture of the model.
        host: Host of this rank.
        store: Store that all ranks share (:func:`.actor.parallel.store`).
        tokenizer: Tokenizer of the model.
        scorer: Scores each response as it finishes.
        stop_token_ids: Ids of the tokens that end a response.
        probe: Prompts to which responses are sampled after each update of the weights.

    Attributes:
        coordinator: Coordinator of the leaders.
        routes: Process groups that bring trajectories from leaders to the ranks that train on them.
        sampler: Sampler of this rank.
        weights: Updates the engine's weights.

    Raises:
        EngineError: The engine does not start, or serves another model.
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
        probe: Sequence[Prompt],
    ) -> None:
        self._config, self._actor = config, actor
        self.routes = Routes.build(actor.layout.data_rank)
        silence, ranks = config.rollout.silence_seconds, actor.layout.world_size
        self.coordinator = StoreCoordinator(store, host.rank, self.routes.leaders, ranks, silence_seconds=silence)
        hosts = dist.PrefixStore("hosts", store)
        starters = StoreCoordinator(hosts, host.rank, host.starters, ranks, silence_seconds=silence)
        self._loop = EventLoopThread()
        self._prefetched: Future[SampledGroups] | None = None
        colocated = config.rollout.servers.colocated
        # A server sizes its KV cache once, from the memory that is free when it starts.
        with actor.offloaded() if colocated else nullcontext():
            try:
                self._opened = self._loop.run(
                    open_engine(config, host, self.coordinator, starters, tokenizer, architecture.vocab)
                )
            except BaseException:
                self._loop.close()
                raise
            try:
                if colocated:
                    self._release("kv_cache", "weights", "cuda_graph")
            except BaseException:
                self._close_engine()
                raise
        try:
            self.weights = WeightUpdater(
                config, actor, architecture, host, self._opened, self.coordinator, self._loop, probe
            )
            settings = sampler_settings(config, stop_token_ids)
            self.sampler = Sampler(self._opened.engine, settings, scorer, self.coordinator)
        except BaseException:
            self._close_engine()
            raise

    @property
    def engine(self) -> RolloutEngine | None:
        """Engine of this rank; None if the rank is no leader."""
        return self._opened.engine

    def paused(self) -> AbstractContextManager[None]:
        """Returns a block in which the thread of engine, sampler and verifier runs nothing."""
        return self._loop.paused()

    @contextmanager
    def serving_weights(self, version: int) -> Iterator[None]:
        """Sends the actor's weights to the engine as ``version``; within the block, the engine samples with them.

        Raises:
            EngineError: The weights did not arrive; see :mod:`.rollout.weight_sync`.
        """
        if not self._config.rollout.servers.colocated:
            self.weights.send(version)
            self.weights.check_probe(self.weights.sample_probe())
            yield
            return
        actor = self._actor
        with actor.offloaded(parameters=False):
            self._restore("weights")
            self.weights.send(version)
            with actor.offloaded(gradients=False, optimizer=False):
                self._restore("kv_cache", "cuda_graph")
                responses = self.weights.sample_probe()
                try:
                    yield
                except (SamplingExhaustedError, VerifierError):
                    with suppress(EngineError):
                        self._release("kv_cache", "weights", "cuda_graph")  # the actor returns and is saved
                    raise
                self._release("kv_cache", "weights", "cuda_graph")
        self.weights.check_probe(responses)

    def sample(self, next_prompts: PromptSource) -> SampledGroups:
        """Samples and scores the groups of a step; call it within :meth:`serving_weights`.

        Args:
            next_prompts: Source of the prompts, the same on every rank.

        Raises:
            EngineError: No server is left, or another rank failed; what was sampled so far is carried over.
            PermanentEngineError: A response cannot be used, or a request cannot be served.
            SamplingExhaustedError: See :class:`.rollout.sampler.Sampler`.
            VerifierError: See :class:`.rollout.sampler.Sampler`.
        """
        try:
            return self._loop.run(self.sampler.step(next_prompts, self.weights.version))
        except PermanentEngineError:
            raise
        except EngineError as error:
            # Restarted servers need weights, which only all ranks together can send.
            if self._config.rollout.servers.colocated or not self.weights.reachable()[0]:
                raise
            logger.warning("%s\nthe weights are sent again", error)
        self.weights.send(self.weights.version)
        return self._loop.run(self.sampler.step(next_prompts, self.weights.version))

    def prefetch(self, next_prompts: PromptSource) -> None:
        """Starts to sample the groups of the next step with the weights that the engine has now."""
        self._prefetched = self._loop.begin(self.sampler.step(next_prompts, self.weights.version))

    @property
    def has_prefetched(self) -> bool:
        """Whether groups are, or are being, prefetched."""
        return self._prefetched is not None

    def wait_prefetched(self) -> SampledGroups | None:
        """Waits for the prefetched groups, which stay here; None if nothing was prefetched.

        Afterwards the carry-over can be saved.

        Raises:
            EngineError: See :meth:`sample`.
            SamplingExhaustedError: See :meth:`sample`.
            VerifierError: See :meth:`sample`.
        """
        return self._prefetched.result() if self._prefetched is not None else None

    def take_prefetched(self) -> SampledGroups | None:
        """Waits for the prefetched groups and hands them over; None if there are none or their engine failed.

        Raises:
            SamplingExhaustedError: See :meth:`sample`.
            VerifierError: See :meth:`sample`.
        """
        try:
            return self.wait_prefetched()
        except EngineError as error:
            logger.warning("%s\nthis step is sampled anew, with its own weights", error)
            return None
        finally:
            self._prefetched = None

    def put_prefetched(self, sampled: SampledGroups) -> None:
        """Takes groups that were sampled already; :meth:`take_prefetched` returns them."""
        self._prefetched = Future()
        self._prefetched.set_result(sampled)

    def cancel_prefetch(self) -> None:
        """Cancels sampling that :meth:`prefetch` started and that is still running."""
        if self._prefetched is not None:
            self._prefetched.cancel()

    def carried(self) -> Carried | None:
        """Returns the carry-over of this rank's sampler; None if the rank is no leader."""
        return self.sampler.carried() if self.engine is not None else None

    def restore(self, step: int, carried: Sequence[Carried], prefetched: SampledGroups | None) -> None:
        """Restores what a checkpoint holds of the rollout side; another number of leaders shares it anew.

        Args:
            step: Step that the run resumes with.
            carried: Carry-over of every leader that saved it; the same on every rank.
            prefetched: Groups that were sampled for the next step; None if there are none.
        """
        if prefetched is not None and _is_usable(prefetched, step, self._config.rollout):
            self.put_prefetched(prefetched)
        if self.engine is None or not carried:
            return
        place, leaders = self.coordinator.leaders.index(self.coordinator.rank), len(self.coordinator.leaders)
        if len(carried) == leaders:
            self.sampler.restore(*carried[place])
            return
        groups = [group for one, _ in carried for group in one]
        partial_groups = [group for _, one in carried for group in one]
        self.sampler.restore(groups[place::leaders], partial_groups[place::leaders])

    def drop_carried(self) -> None:
        """Waits until prefetching is over, and drops the prefetched groups and the carry-over of this rank."""
        with suppress(EngineError, SamplingExhaustedError, VerifierError):
            self.wait_prefetched()
        self._prefetched = None
        self.sampler.restore((), ())

    def progress(self) -> ProgressSnapshot:
        """Returns the sampling progress of all leaders as rank 0 knows it; may be called from any thread."""
        others = self.coordinator.others() if len(self.coordinator.leaders) > 1 else {}
        seen = [tuple(one.values()) for rank, one in others.items() if rank != self.coordinator.rank and one]
        return combine_snapshots([self.sampler.progress.now(), *(ProgressSnapshot(*one) for one in seen)])

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the engine's event loop and returns its result."""
        return self._loop.run(work)

    def close(self) -> None:
        """Ends the engine and its event loop."""
        self.weights.close()
        self._close_engine()

    def _close_engine(self) -> None:
        self._loop.run(self._opened.close())
        self._loop.close()

    def _restore(self, *memory: EngineMemory) -> None:
        self._control(lambda engine: engine.restore_memory(*memory))

    def _release(self, *memory: EngineMemory) -> None:
        self._control(lambda engine: engine.release_memory(*memory))

    def _control(self, call: Callable[[RolloutEngine], Awaitable[None]]) -> None:
        """Makes a call on the first leader's engine; all ranks continue when it is done."""

        async def control() -> None:
            error: Exception | None = None
            try:
                if self.coordinator.rank == 0:
                    assert self._opened.engine is not None
                    async with self.coordinator.alive():
                        await call(self._opened.engine)
            except Exception as failed:
                error = failed
            await self.coordinator.gather({}, error)

        self._loop.run(control())


def _is_usable(prefetched: SampledGroups, step: int, rollout: RolloutConfig) -> bool:
    """Returns whether prefetched groups respect the limits of today, which may have been lowered since."""
    age = max((step - record.oldest for record in prefetched.records), default=0)
    longest = max((length for record in prefetched.records for length in record.response_tokens), default=0)
    for found, unit, limit, name in (
        (age, "versions old", rollout.max_staleness, "max_staleness"),
        (longest, "tokens long", rollout.max_response_tokens, "max_response_tokens"),
    ):
        if found > limit:
            logger.warning("prefetched groups are dropped: they are %d %s, rollout.%s is %d", found, unit, name, limit)
            return False
    return True
