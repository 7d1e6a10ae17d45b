"""Samples the groups of a step: G responses per prompt, dynamic sampling, over-sampling, carry-over.

A step samples batches of prompts until enough groups are kept. A group is kept unless its responses are all right or
all wrong; in place of a group that is not kept, a prompt of the next batch is begun at once. With over-sampling the
slowest responses are aborted as soon as enough groups are kept. Partial groups, and complete groups beyond those
needed, are carried to the next step, if their weights may be that old (DAPO discards them; see docs/rollout.md).

Each leader samples its share of a batch. The leaders exchange metadata (:mod:`.assignment`), from which every rank,
leader or not, makes the same decisions. With one leader and the embedded engine no result depends on time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch.distributed as dist

from fipo_megatron.algorithm.advantages import is_informative
from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Group, Prompt, Trajectory
from fipo_megatron.rollout.assignment import assign_prompts, interleave_by_leader
from fipo_megatron.rollout.carry_over import Carried, PartialGroup, is_usable, sampled_lengths
from fipo_megatron.rollout.engine import RolloutEngine
from fipo_megatron.rollout.group_sampler import GroupSampler
from fipo_megatron.rollout.sampler_settings import PromptSource, SamplerSettings, Scorer
from fipo_megatron.rollout.sampling_progress import SamplingProgress
from fipo_megatron.rollout.step_checks import StepChecks
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1


class SamplingExhaustedError(RuntimeError):
    """Too few groups were kept after the last batch of prompts. The groups that were kept are carried.

    Attributes:
        out_of_prompts: True if there are no more prompts: sampling again does not help.
    """

    def __init__(self, message: str, *, out_of_prompts: bool = False) -> None:
        super().__init__(message)
        self.out_of_prompts = out_of_prompts


@dataclass(frozen=True)
class SampledGroups:
    """The groups of a step.

    Attributes:
        records: Metadata of all groups, in the same order on every rank.
        groups: Scored groups of this leader, in the same order.
        statistics: Counts over all leaders: batches; groups sampled, kept, dropped by reason, carried in and out;
            responses aborted and continued; tokens sampled; failed checks by kind, and dropped responses with their
            tokens, if there are any.
        seconds: Seconds that sampling took; 0 if unknown.
    """

    records: tuple[GroupRecord, ...]
    groups: tuple[Group, ...]
    statistics: Mapping[str, int]
    seconds: float = 0.0


class Sampler:
    """Samples groups with one engine per leader.

    Args:
        engine: Engine of this rank; None on ranks that are not leaders.
        settings: Settings, the same on every rank.
        scorer: Scores each response as soon as it is finished.
        coordinator: Exchanges metadata with other ranks; None if there is one rank.

    Attributes:
        progress: Progress of this rank.
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        settings: SamplerSettings,
        scorer: Scorer,
        coordinator: StoreCoordinator | None = None,
    ) -> None:
        self.settings = settings
        self.progress = SamplingProgress()
        self._coordinator = coordinator or StoreCoordinator(dist.HashStore(), 0)
        self._counts: Counter[str] = Counter()
        self._checks = StepChecks()
        self._empty_steps = 0
        self._groups: deque[Group] = deque()
        self._partial: deque[PartialGroup] = deque()
        self._group_sampler: GroupSampler | None = None
        if engine is not None:
            self._group_sampler = GroupSampler(
                engine,
                settings.sampling,
                run_seed=settings.run_seed,
                keep_partial=settings.max_staleness > 0,
                scorer=scorer,
                counts=self._counts,
                checks=self._checks.mine,
                progress=self.progress,
                on_response=self._publish_progress,
            )

    @property
    def statistics(self) -> Mapping[str, int]:
        """Counts of this rank in the last step."""
        return self._counts

    async def step(self, next_prompts: PromptSource, version: int) -> SampledGroups:
        """Samples the groups of a step; all ranks must call it.

        Args:
            next_prompts: Source of the prompts, the same on every rank.
            version: Version of the engine's weights.

        Returns:
            Carried groups first, then the others by batch, in the order of their prompts.

        Raises:
            SamplingExhaustedError: too few groups were kept, and ``on_exhausted`` is ``error``; or none was kept, and
                there are no more prompts or it is the last of ``max_empty_steps`` such steps. On every rank.
            EngineError: an engine failed; raised on its rank, and with its text on the others.
            VerifierError: the verifier does not work, or failed on more than ``max_failure_fraction`` of the answers;
                on every rank. Groups without a failed check are carried, the others sampled again.
        """
        start = time.perf_counter()
        self._counts.clear()
        self._checks.clear()
        self.progress.reset()
        self._drop_stale(version)
        mine = {group.prompt.id: group for group in self._groups}
        self._counts["groups_carried_in"] = len(mine)
        self._groups.clear()
        try:
            kept, batches, everyone, out_of_prompts = await self._sample(mine, next_prompts)
        except BaseException as error:
            if isinstance(error, VerifierError):
                self._restart_unchecked(mine)
            self._groups.extend(mine.values())
            raise
        need = self.settings.prompts_per_step
        statistics = everyone | {"batches": batches, "groups_carried_out": max(0, len(kept) - need)}
        exhausted = self._exhaustion(len(kept), batches, statistics, out_of_prompts)
        carried = kept if exhausted else kept[need:]
        self._groups.extend(mine[record.prompt] for record in carried if record.prompt in mine)
        if exhausted:
            raise SamplingExhaustedError(exhausted, out_of_prompts=out_of_prompts)
        used = tuple(kept[:need])
        groups = tuple(mine[record.prompt] for record in used if record.prompt in mine)
        return SampledGroups(used, groups, statistics, time.perf_counter() - start)

    async def _sample(
        self, mine: dict[str, Group], next_prompts: PromptSource
    ) -> tuple[list[GroupRecord], int, dict[str, int], bool]:
        """Samples batches of prompts until enough groups are kept; adds the groups of this rank to ``mine``.

        Returns:
            Metadata of all kept groups, number of batches, counts over all leaders, and whether nothing is left to
            sample.
        """
        kept, partial, everyone = await self._exchange_metadata(mine.values())
        need, batches, no_more = self.settings.prompts_per_step, 0, False
        while len(kept) < need and batches < self.settings.max_batches:
            missing = need - len(kept)
            wanted = math.ceil(missing * self.settings.over_sampling)
            prompts = next_prompts(asked := max(0, wanted - sum(partial)))
            no_more |= len(prompts) < asked
            continued, new = assign_prompts(min(wanted, sum(partial) + len(prompts)), partial)
            if not sum(continued) + len(prompts):
                break
            has_next = self.settings.dynamic_sampling and batches + 1 < self.settings.max_batches
            spare = next_prompts(wanted) if has_next else ()
            self._coordinator.open_claims()
            try:
                found, error = await self._sample_share(continued, new, prompts, spare, missing)
                mine |= {group.prompt.id: group for group in found}
                records, partial, everyone = await self._exchange_metadata(found, error)
            finally:
                begun = min(self._coordinator.close_claims(), len(spare))
                if begun < len(spare):
                    next_prompts.given -= len(spare) - begun
            no_more |= has_next and begun == len(spare) < wanted
            order = {prompt.id: place for place, prompt in enumerate([*prompts, *spare])}
            kept += sorted(records, key=lambda record: order.get(record.prompt, -1))
            batches += 1 + (begun > 0)
        return kept, batches, everyone, no_more and not sum(partial)

    def _exhaustion(self, kept: int, batches: int, statistics: Mapping[str, int], out_of_prompts: bool) -> str:
        """Returns why a step cannot go on with this number of kept groups; empty if it can. Warns of an empty step."""
        settings = self.settings
        self._empty_steps = 0 if kept else self._empty_steps + 1
        if kept >= settings.prompts_per_step or (kept and settings.on_exhausted == "smaller"):
            return ""
        counts = {name: count for name, count in statistics.items() if count}
        limit = f"rollout.max_generation_batches = {settings.max_batches}"
        found = f"{kept} of {settings.prompts_per_step} groups after {batches} batches of prompts"
        if out_of_prompts:
            return f"{found}; data.epochs is used up, there are no more prompts: {counts}"
        if settings.on_exhausted == "error":
            return f"{found} ({limit}): {counts}"
        if self._empty_steps >= settings.max_empty_steps:
            steps = f"in each of {self._empty_steps} steps (rollout.max_empty_steps = {settings.max_empty_steps})"
            return f"no group was kept {steps}; in the last one: {counts}"
        if self._coordinator.rank == 0:
            logger.warning("nothing to learn from in this step: %s (%s): %s", found, limit, counts)
        return ""

    async def _exchange_metadata(
        self, groups: Iterable[Group], error: BaseException | None = None
    ) -> tuple[list[GroupRecord], list[int], dict[str, int]]:
        """Exchanges metadata with the other ranks; raises on every rank if ``error`` is given on any.

        Returns:
            Metadata of the given groups of all leaders, number of partial groups of each leader, and counts over all
            leaders.
        """
        records = [GroupRecord.of(group, self._coordinator.rank) for group in groups]
        self._counts["prompts_carried_out"] = len(self._partial)
        report = {
            "records": records,
            "partial": len(self._partial),
            "counts": dict(self._counts),
            "checks": self._checks.mine,
            "verifier_error": self._checks.error,
        }
        reports = await self._coordinator.gather(report, error)
        checks, errors = [CheckCounts(**one["checks"]) for one in reports], [one["verifier_error"] for one in reports]
        warns = self._coordinator.rank == 0
        self._checks.judge(checks, errors, self.settings.max_failure_fraction, warns=warns)
        everyone: Counter[str] = Counter()
        for one in reports:
            everyone.update(one["counts"])
        by_leader = [[GroupRecord.parse(record) for record in one["records"]] for one in reports]
        return interleave_by_leader(by_leader), [one["partial"] for one in reports], dict(everyone)

    async def _sample_share(
        self,
        continued: Sequence[int],
        new: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        spare: Sequence[Prompt],
        missing: int,
    ) -> tuple[list[Group], BaseException | None]:
        """Samples this leader's share of a batch; returns an error, so that it can be raised on all ranks.

        A VerifierError is kept until the reports are exchanged; see :meth:`.StepChecks.judge`.
        """
        if self._coordinator.rank not in self._coordinator.leaders:
            return [], None
        place = self._coordinator.leaders.index(self._coordinator.rank)
        batch = [self._partial.popleft() for _ in range(continued[place])]
        self._counts["prompts_carried_in"] += len(batch)
        batch += [self._new_group(prompts[number]) for number in new[place]]
        responses = (sum(continued) + len(prompts) + len(spare)) * self.settings.samples_per_prompt
        most_failures = self.settings.max_failure_fraction * (self._checks.everyone.checks + responses)
        try:
            async with self._coordinator.alive():
                return await self._sample_groups(batch, spare, missing, most_failures), None
        except VerifierError as error:
            self._checks.error = str(error)
            return [], None
        except Exception as error:
            return [], error

    def _new_group(self, prompt: Prompt) -> PartialGroup:
        return PartialGroup.new(prompt, self.settings.samples_per_prompt)

    def carried(self) -> Carried:
        """Returns the groups that are carried to the next step. Must not be called during a step."""
        return list(self._groups), list(self._partial)

    def restore(self, groups: Iterable[Group], partial: Iterable[PartialGroup]) -> None:
        """Replaces the carried groups by those of an earlier :meth:`carried`.

        Prompts with a response that is longer than the limit of today start again, with a warning.
        """
        limit, found = self.settings.sampling.max_tokens, list[Group | PartialGroup]([*groups, *partial])
        too_long = [one.prompt for one in found if not is_usable(one, 0, limit)]
        usable = [one for one in found if is_usable(one, 0, limit)]
        if too_long:
            text = "%d carried prompts start again: responses to them are longer than rollout.max_response_tokens = %d"
            logger.warning(text, len(too_long), limit)
        self._groups = deque(one for one in usable if isinstance(one, Group))
        self._partial = deque(one for one in usable if isinstance(one, PartialGroup))
        self._partial.extend(map(self._new_group, too_long))
        self._empty_steps = 0

    def _drop_stale(self, version: int) -> None:
        """Drops groups with tokens of weights that are too old, and restarts such partial groups."""
        oldest, limit = version - self.settings.max_staleness, self.settings.sampling.max_tokens
        groups, partial = self._groups, self._partial
        self._groups, self._partial = deque(), deque()
        for group in groups:
            if is_usable(group, oldest, limit):
                self._groups.append(group)
                continue
            self._counts["groups_dropped_stale"] += 1
            self._count_dropped("dropped", sampled_lengths(group))
        for one in partial:
            if is_usable(one, oldest, limit):
                self._partial.append(one)
                continue
            self._counts["prompts_restarted_stale"] += 1
            self._count_dropped("restarted", sampled_lengths(one))
            self._partial.append(self._new_group(one.prompt))

    async def _sample_groups(
        self, batch: Sequence[PartialGroup], spare: Sequence[Prompt], missing: int, most_failures: float
    ) -> list[Group]:
        """Samples groups; returns those that are kept, in the order in which they were complete.

        Args:
            batch: Groups to complete.
            spare: Prompts that any leader begins, in this order, in place of a group that it drops.
            missing: Number of groups that all leaders together still need.
            most_failures: See :meth:`.GroupSampler.sample_batch`.
        """
        sampler = self._group_sampler
        assert sampler is not None
        kept: list[Group] = []
        dropped_unchecked: list[Prompt] = []
        begun = list(batch)
        running = len(batch)

        async def decide(group: Group) -> PartialGroup | None:
            nonlocal running
            running -= 1
            self._counts["groups_sampled"] += 1
            if self._keeps(group):
                kept.append(group)
                if self._coordinator.count(1) >= missing:
                    await sampler.abort()
                return None
            if _has_failure(group.trajectories):
                dropped_unchecked.append(group.prompt)
            wanted = len(batch) - len(kept) * self.settings.over_sampling
            if sampler.aborting or running >= wanted or (number := self._coordinator.claim()) >= len(spare):
                return None
            running += 1
            self._counts["prompts_begun_early"] += 1
            begun.append(self._new_group(spare[number]))
            return begun[-1]

        try:
            async with self._watching_other_ranks(sampler, missing):
                partial = await sampler.sample_batch(batch, decide, most_failures)
        except BaseException:
            # All prompts of this share are sampled again, also those of kept groups: no prompt is lost.
            self._partial.extendleft(reversed(begun))
            raise
        self._checks.dropped_unchecked += dropped_unchecked
        self._partial.extend(partial)
        return kept

    @asynccontextmanager
    async def _watching_other_ranks(self, sampler: GroupSampler, missing: int) -> AsyncIterator[None]:
        """Opens a block that raises EngineError if another rank fails; aborts once all leaders have enough groups."""
        if len(self._coordinator.leaders) == 1:
            yield
            return

        async def watch() -> None:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                self._coordinator.look()
                if self._coordinator.count(0) >= missing:
                    await sampler.abort()

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
        """Returns whether a group is kept, and counts it. Responses whose check failed do not count."""
        checked = [t for t in group.trajectories if t.reward is not None or not t.failure]
        if not checked:
            self._counts["groups_unchecked"] += 1
            return False
        accuracies = [trajectory.accuracy or 0 for trajectory in checked]
        if not self.settings.dynamic_sampling or is_informative(accuracies):
            self._counts["groups_kept"] += 1
            return True
        self._counts["groups_all_right" if any(accuracies) else "groups_all_wrong"] += 1
        return False

    def _restart_unchecked(self, mine: dict[str, Group]) -> None:
        """Lets the prompts of all groups that hold a failed check be sampled again."""
        prompts = list(self._checks.dropped_unchecked)
        for group in [group for group in mine.values() if _has_failure(group.trajectories)]:
            prompts.append(mine.pop(group.prompt.id).prompt)
        self._partial = deque(
            self._new_group(one.prompt) if _has_failure(one.finished) else one for one in self._partial
        )
        self._partial.extend(self._new_group(prompt) for prompt in prompts)

    def _count_dropped(self, how: str, lengths: Sequence[int]) -> None:
        """Counts responses that are not learned from, and their tokens."""
        if lengths:
            self._counts[f"responses_{how}"] += len(lengths)
            self._counts[f"tokens_{how}"] += sum(lengths)

    def _publish_progress(self) -> None:
        names = ("done", "begun", "tokens", "oldest")
        self._coordinator.progress = dict(zip(names, self.progress.now(), strict=True))


def _has_failure(trajectories: Iterable[Trajectory]) -> bool:
    return any(trajectory.failure for trajectory in trajectories)
