"""Samples the groups of a step: G responses per prompt, dynamic sampling, over-sampling, carry-over.

A step samples batches of prompts until enough groups are kept. A group is kept unless its responses are all right or
all wrong. With over-sampling the slowest responses are aborted as soon as enough groups are kept; what there is of
them, and groups beyond the need, are carried to the next step (DAPO throws groups away; see docs/rollout.md).

Each leader samples its share of a batch. What they tell each other is metadata (:mod:`.assignment`), and every rank,
leader or not, decides the same from it. With one leader and the embedded engine nothing depends on time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from fipo_megatron.algorithm.advantages import is_informative
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Group, Prompt, Score, TokenSpan, Trajectory
from fipo_megatron.rollout.assignment import assign_prompts, interleave_by_leader
from fipo_megatron.rollout.carry_over import Carried, PartialGroup, PartialResponse
from fipo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters, sampling_seed
from fipo_megatron.rollout.sampling_progress import SamplingProgress
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.testing import fail_points

_LOOK_SECONDS = 0.1


Scorer = Callable[[Trajectory], Awaitable[Score]]
"""Scores one response; never raises because of what it says."""


class SamplingExhaustedError(RuntimeError):
    """Too few groups were kept after the last batch of prompts. Nothing is lost: what was kept is carried."""


@dataclass(frozen=True)
class SamplerSettings:
    """How a step is sampled.

    Attributes:
        prompts_per_step: Groups that a step needs.
        samples_per_prompt: G.
        sampling: Temperature and so on; ``max_tokens`` of a whole response.
        run_seed: See :func:`.engine.sampling_seed`.
        dynamic_sampling: Keep only groups that are neither all right nor all wrong.
        max_batches: Batches of prompts in a step.
        over_sampling: So many times the missing groups are sampled; above 1 the tail is aborted.
        max_staleness: How many versions older than the current one a token's weights may be; 0: nothing that is
            unfinished is carried, and groups only to where they are still fresh enough.
        on_exhausted: What happens after ``max_batches``: an error, or a smaller step.
    """

    prompts_per_step: int
    samples_per_prompt: int
    sampling: SamplingParameters
    run_seed: int = 0
    dynamic_sampling: bool = True
    max_batches: int = 10
    over_sampling: float = 1.0
    max_staleness: int = 0
    on_exhausted: Literal["error", "smaller"] = "error"


@dataclass(frozen=True)
class SampledGroups:
    """The groups of a step.

    Attributes:
        records: All of them, in one order, the same on every rank.
        groups: Those of this leader, in the same order, scored.
        statistics: Counts over all leaders: batches, groups sampled, kept, dropped and why, carried in and out,
            responses aborted and continued, tokens sampled.
        seconds: That it took; 0 where that is not known.
    """

    records: tuple[GroupRecord, ...]
    groups: tuple[Group, ...]
    statistics: Mapping[str, int]
    seconds: float = 0.0


class Sampler:
    """Samples groups with one engine per leader.

    Args:
        engine: Samples responses; None on ranks that do not lead.
        settings: See :class:`SamplerSettings`; the same on every rank.
        scorer: Scores responses as they come.
        coordinator: Where the ranks meet; None: there is one rank.
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        settings: SamplerSettings,
        scorer: Scorer,
        coordinator: StoreCoordinator | None = None,
    ) -> None:
        self.settings = settings
        self._engine, self._scorer = engine, scorer
        self._coordinator = coordinator or StoreCoordinator(dist.HashStore(), 0)
        self._counts: Counter[str] = Counter()
        self._groups: deque[Group] = deque()
        self._unfinished: deque[PartialGroup] = deque()
        self._aborting = False
        self.progress = SamplingProgress()
        """How far this rank is."""

    @property
    def statistics(self) -> Mapping[str, int]:
        """What this rank has counted in the last step."""
        return self._counts

    async def step(self, next_prompts: Callable[[int], Sequence[Prompt]], version: int) -> SampledGroups:
        """The groups of a step: carried ones first, then in the order in which they were complete. On all ranks.

        Args:
            next_prompts: Gives so many new prompts, the same on every rank; fewer where there are no more.
            version: Of the engine's weights.

        Raises:
            SamplingExhaustedError: see ``on_exhausted``; on every rank.
            EngineError: of an engine, on its rank; elsewhere with its text.
        """
        start = time.perf_counter()
        self._counts = Counter()
        self.progress.reset()
        self._drop_stale(version)
        mine = {group.prompt.id: group for group in self._groups}
        self._counts["groups_carried_in"] = len(mine)
        self._groups.clear()
        try:
            kept, batches, everyone = await self._sample(mine, next_prompts)
        except BaseException:
            self._groups.extend(mine.values())
            raise
        need = self.settings.prompts_per_step
        statistics = everyone | {"batches": batches, "groups_carried_out": max(0, len(kept) - need)}
        exhausted = len(kept) < need and self.settings.on_exhausted == "error"
        carried = kept if exhausted else kept[need:]
        self._groups.extend(mine[record.prompt] for record in carried if record.prompt in mine)
        if exhausted:
            raise SamplingExhaustedError(
                f"{len(kept)} of {need} groups after {batches} batches of prompts "
                f"(rollout.max_generation_batches = {self.settings.max_batches}): {statistics}"
            )
        used = tuple(kept[:need])
        groups = tuple(mine[record.prompt] for record in used if record.prompt in mine)
        return SampledGroups(used, groups, statistics, time.perf_counter() - start)

    async def _sample(
        self, mine: dict[str, Group], next_prompts: Callable[[int], Sequence[Prompt]]
    ) -> tuple[list[GroupRecord], int, dict[str, int]]:
        """Batches of prompts until there are enough; adds this rank's groups to ``mine``."""
        kept, unfinished, everyone = await self._tell(mine.values())
        need, batches = self.settings.prompts_per_step, 0
        while len(kept) < need and batches < self.settings.max_batches:
            missing = need - len(kept)
            wanted = math.ceil(missing * self.settings.over_sampling)
            prompts = next_prompts(max(0, wanted - sum(unfinished)))
            taken, new = assign_prompts(min(wanted, sum(unfinished) + len(prompts)), unfinished)
            if not sum(taken) + len(prompts):
                break
            batches += 1
            found, error = await self._share(taken, new, prompts, missing)
            mine |= {group.prompt.id: group for group in found}
            records, unfinished, everyone = await self._tell(found, error)
            kept += records
        return kept, batches, everyone

    async def _tell(
        self, groups: Iterable[Group], error: BaseException | None = None
    ) -> tuple[list[GroupRecord], list[int], dict[str, int]]:
        """Exchanges metadata: all leaders' groups, how many prompts each has begun, and what all have counted."""
        records = [GroupRecord.of(group, self._coordinator.rank) for group in groups]
        self._counts["prompts_carried_out"] = len(self._unfinished)
        report = {"records": records, "unfinished": len(self._unfinished), "counts": dict(self._counts)}
        reports = await self._coordinator.gather(report, error)
        everyone: Counter[str] = Counter()
        for one in reports:
            everyone.update(one["counts"])
        by_leader = [[GroupRecord.parse(record) for record in one["records"]] for one in reports]
        return interleave_by_leader(by_leader), [one["unfinished"] for one in reports], dict(everyone)

    async def _share(
        self, taken: Sequence[int], new: Sequence[Sequence[int]], prompts: Sequence[Prompt], missing: int
    ) -> tuple[list[Group], BaseException | None]:
        """Samples this leader's share of a batch; an error is returned, so that all ranks hear of it."""
        if self._coordinator.rank not in self._coordinator.leaders:
            return [], None
        place = self._coordinator.leaders.index(self._coordinator.rank)
        batch = [self._unfinished.popleft() for _ in range(taken[place])]
        self._counts["prompts_carried_in"] += len(batch)
        batch += [self._begun(prompts[number]) for number in new[place]]
        try:
            async with self._coordinator.alive():
                return await self._run(batch, missing), None
        except Exception as error:
            return [], error

    def _begun(self, prompt: Prompt) -> PartialGroup:
        drafts = (PartialResponse.new(prompt, sample) for sample in range(self.settings.samples_per_prompt))
        return PartialGroup(prompt, (), tuple(drafts))

    def carried(self) -> Carried:
        """All that goes on to the next step (:func:`.carry_over.serialize_groups` saves it); not within a step."""
        return list(self._groups), list(self._unfinished)

    def restore(self, groups: Iterable[Group], unfinished: Iterable[PartialGroup]) -> None:
        """Goes on with what :meth:`carried` gave."""
        self._groups, self._unfinished = deque(groups), deque(unfinished)

    def _drop_stale(self, version: int) -> None:
        """What has tokens of weights that are too old by now starts again, or is dropped where it was complete."""
        oldest = version - self.settings.max_staleness
        fresh = [group for group in self._groups if all(_age(t.spans) >= oldest for t in group.trajectories)]
        self._counts["groups_dropped_stale"] = len(self._groups) - len(fresh)
        self._groups = deque(fresh)
        for _ in range(len(self._unfinished)):
            one = self._unfinished.popleft()
            spans = [t.spans for t in one.finished] + [d.spans for d in one.drafts if d.spans]
            if all(_age(span) >= oldest for span in spans):
                self._unfinished.append(one)
            else:
                self._counts["prompts_restarted_stale"] += 1
                self._unfinished.append(self._begun(one.prompt))

    async def _run(self, batch: Sequence[PartialGroup], missing: int) -> list[Group]:
        """Samples a share; groups that are kept, in the order in which they were complete."""
        self._aborting = False
        kept: list[Group] = []
        tasks = [asyncio.create_task(self._complete(one)) for one in batch]
        try:
            async with self._watched(missing):
                for next_done in asyncio.as_completed(tasks):
                    found = await next_done
                    if isinstance(found, PartialGroup):
                        continue
                    self._counts["groups_sampled"] += 1
                    if self._keeps(found):
                        kept.append(found)
                        if self._coordinator.count(1) >= missing and not all(task.done() for task in tasks):
                            await self._abort()
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # What was kept of this share is sampled again: its prompts are not lost, its responses are.
            self._unfinished.extendleft(reversed(batch))
            raise
        self._unfinished.extend(result for task in tasks if isinstance(result := task.result(), PartialGroup))
        return kept

    async def _abort(self) -> None:
        assert self._engine is not None
        if not self._aborting:
            self._aborting = True
            await self._engine.abort()

    @asynccontextmanager
    async def _watched(self, missing: int) -> AsyncIterator[None]:
        """A block that ends where another rank fails; responses are aborted where all leaders together have enough."""
        if len(self._coordinator.leaders) == 1:
            yield
            return

        async def watch() -> None:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                self._coordinator.look()
                if self._coordinator.count(0) >= missing:
                    await self._abort()

        block = asyncio.current_task()
        assert block is not None
        failed: list[BaseException] = []

        def stop(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                failed.append(error)
                block.cancel()

        watcher = asyncio.create_task(watch())
        watcher.add_done_callback(stop)
        try:
            yield
        except asyncio.CancelledError:
            if failed:
                block.uncancel()
                raise failed[0] from None
            raise
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    def _keeps(self, group: Group) -> bool:
        accuracies = [trajectory.accuracy or 0 for trajectory in group.trajectories]
        if not self.settings.dynamic_sampling or is_informative(accuracies):
            self._counts["groups_kept"] += 1
            return True
        self._counts["groups_all_right" if any(accuracies) else "groups_all_wrong"] += 1
        return False

    async def _complete(self, one: PartialGroup) -> Group | PartialGroup:
        """All responses to a prompt; what there is of them where they were aborted."""
        found = await asyncio.gather(*(self._respond(draft) for draft in one.drafts))
        finished = [*one.finished, *(result for result in found if isinstance(result, Trajectory))]
        drafts = [result for result in found if isinstance(result, PartialResponse)]
        if not drafts:
            return Group(one.prompt, tuple(sorted(finished, key=lambda trajectory: trajectory.sample)))
        if not self.settings.max_staleness:
            return PartialGroup(one.prompt, (), tuple(PartialResponse.new(one.prompt, d.sample) for d in one.drafts))
        return PartialGroup(one.prompt, tuple(finished), tuple(drafts))

    async def _respond(self, draft: PartialResponse) -> Trajectory | PartialResponse:
        """One response, begun anew as often as somebody else aborts it."""
        with self.progress.response():
            found = await self._sampled(draft)
        if isinstance(found, Trajectory):
            self.progress.complete(len(found.tokens))
        self._coordinator.progress = dict(zip(("done", "begun", "tokens", "oldest"), self.progress.now(), strict=True))
        return found

    async def _sampled(self, draft: PartialResponse) -> Trajectory | PartialResponse:
        while True:
            if self._aborting:
                return draft
            assert self._engine is not None
            generation = await self._engine.generate(self._request(draft))
            fail_points.reach("response")
            self._counts["tokens_sampled"] += len(generation.tokens)
            start = len(draft.tokens)
            spans = [replace(span, start=span.start + start) for span in generation.spans]
            draft = PartialResponse(
                draft.prompt,
                draft.sample,
                np.concatenate([draft.tokens, generation.tokens]),
                np.concatenate([draft.log_probs, generation.log_probs]),
                _joined([*draft.spans, *spans]),
                draft.interruptions + (generation.finish_reason == "abort"),
            )
            if generation.finish_reason != "abort":
                return await self._scored(draft, generation.finish_reason)
            self._counts["responses_aborted"] += 1

    def _request(self, draft: PartialResponse) -> GenerationRequest:
        prompt, sampling = draft.prompt, self.settings.sampling
        return GenerationRequest(
            id=f"{prompt.id}/{draft.sample}/{draft.interruptions}",
            group=prompt.id,
            tokens=np.concatenate([prompt.tokens, draft.tokens]),
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(draft.tokens)),
            seed=sampling_seed(self.settings.run_seed, prompt.id, draft.sample, draft.interruptions),
        )

    async def _scored(self, draft: PartialResponse, reason: Any) -> Trajectory:
        if draft.interruptions:
            self._counts["responses_continued"] += 1
        trajectory = Trajectory(
            prompt=draft.prompt,
            sample=draft.sample,
            tokens=draft.tokens,
            behaviour_log_probs=draft.log_probs,
            mask=np.ones(len(draft.tokens), np.bool_),
            spans=draft.spans,
            finish_reason=reason,
        )
        assert self._engine is not None
        async with self._engine.deciding():
            score = await self._scorer(trajectory)
        return replace(trajectory, reward=score.reward, accuracy=score.accuracy)


def _age(spans: Sequence[TokenSpan]) -> int:
    """The oldest version."""
    return min(span.weight_version for span in spans)


def _joined(spans: Sequence[TokenSpan]) -> tuple[TokenSpan, ...]:
    """Neighbours of one version are one span."""
    return tuple(s for i, s in enumerate(spans) if i == 0 or s.weight_version != spans[i - 1].weight_version)
