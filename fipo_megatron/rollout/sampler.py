"""Samples the groups of a step: G responses per prompt, dynamic sampling, over-sampling, carry-over.

A step samples batches of prompts until enough groups are kept. A group is kept unless its responses are all right or
all wrong. With over-sampling the slowest responses are aborted as soon as enough groups are kept; what there is of
them, and groups beyond the need, are carried to the next step (DAPO throws groups away; see docs/rollout.md). Nothing
here looks at a clock.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Group, Prompt, TokenSpan, Trajectory

from . import sampler_state
from .engine import GenerationRequest, RolloutEngine, SamplingParameters, sampling_seed
from .sampler_state import Draft, Unfinished


@dataclass(frozen=True)
class Score:
    """What a response is worth.

    Attributes:
        reward: Shaped.
        accuracy: 0 or 1: what dynamic sampling looks at.
    """

    reward: float
    accuracy: int


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


class Sampler:
    """Samples groups with one engine.

    Args:
        engine: Samples responses.
        settings: See :class:`SamplerSettings`.
        scorer: Scores responses as they come.

    Attributes:
        statistics: Counts of the last step: batches, groups sampled, kept, dropped and why, carried in and out,
            responses aborted and continued.
    """

    def __init__(self, engine: RolloutEngine, settings: SamplerSettings, scorer: Scorer) -> None:
        self.engine, self.settings, self.scorer = engine, settings, scorer
        self.statistics: Counter[str] = Counter()
        self._groups: deque[Group] = deque()
        self._unfinished: deque[Unfinished] = deque()
        self._aborting = False

    async def step(self, next_prompts: Callable[[int], Sequence[Prompt]], version: int) -> list[Group]:
        """The groups of a step, scored, in the order in which they were complete; carried ones first.

        Args:
            next_prompts: Gives so many new prompts; fewer where there are no more.
            version: Of the engine's weights.

        Raises:
            SamplingExhaustedError: see ``on_exhausted``.
        """
        self.statistics = Counter()
        self._drop_stale(version)
        kept = list(self._groups)
        self._groups.clear()
        self.statistics["groups_carried_in"] = len(kept)
        need = self.settings.prompts_per_step
        while len(kept) < need and self.statistics["batches"] < self.settings.max_batches:
            missing = need - len(kept)
            batch = self._batch(math.ceil(missing * self.settings.over_sampling), next_prompts)
            if not batch:
                break
            self.statistics["batches"] += 1
            kept += await self._run(batch, missing)
        self._groups.extend(kept[need:])
        self.statistics["groups_carried_out"] = len(self._groups)
        self.statistics["prompts_carried_out"] = len(self._unfinished)
        if len(kept) < need and self.settings.on_exhausted == "error":
            self._groups.extend(kept)
            raise SamplingExhaustedError(
                f"{len(kept)} of {need} groups after {self.statistics['batches']} batches of prompts "
                f"(rollout.max_generation_batches = {self.settings.max_batches}): {dict(self.statistics)}"
            )
        return kept[:need]

    def state(self) -> dict[str, NDArray[Any]]:
        """All that is carried, as arrays to be saved; not to be called within a step."""
        return sampler_state.pack(self._groups, self._unfinished)

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what :meth:`state` gave."""
        groups, unfinished = sampler_state.unpack(state)
        self._groups, self._unfinished = deque(groups), deque(unfinished)

    def _batch(self, count: int, next_prompts: Callable[[int], Sequence[Prompt]]) -> list[Unfinished]:
        """What was begun comes first."""
        batch = [self._unfinished.popleft() for _ in range(min(count, len(self._unfinished)))]
        self.statistics["prompts_carried_in"] += len(batch)
        if len(batch) < count:
            for prompt in next_prompts(count - len(batch)):
                drafts = tuple(Draft.new(prompt, sample) for sample in range(self.settings.samples_per_prompt))
                batch.append(Unfinished(prompt, (), drafts))
        return batch

    def _drop_stale(self, version: int) -> None:
        """What has tokens of weights that are too old by now starts again, or is dropped where it was complete."""
        oldest = version - self.settings.max_staleness
        fresh = [group for group in self._groups if all(_age(t.spans) >= oldest for t in group.trajectories)]
        self.statistics["groups_dropped_stale"] = len(self._groups) - len(fresh)
        self._groups = deque(fresh)
        for _ in range(len(self._unfinished)):
            one = self._unfinished.popleft()
            spans = [t.spans for t in one.finished] + [d.spans for d in one.drafts if d.spans]
            if all(_age(span) >= oldest for span in spans):
                self._unfinished.append(one)
            else:
                self.statistics["prompts_restarted_stale"] += 1
                drafts = tuple(Draft.new(one.prompt, n) for n in range(self.settings.samples_per_prompt))
                self._unfinished.append(Unfinished(one.prompt, (), drafts))

    async def _run(self, batch: Sequence[Unfinished], missing: int) -> list[Group]:
        """Samples a batch; groups that are kept, in the order in which they were complete."""
        self._aborting = False
        kept: list[Group] = []
        tasks = [asyncio.create_task(self._complete(one)) for one in batch]
        try:
            for next_done in asyncio.as_completed(tasks):
                found = await next_done
                if isinstance(found, Unfinished):
                    continue
                self.statistics["groups_sampled"] += 1
                if self._keeps(found):
                    kept.append(found)
                if len(kept) >= missing and not self._aborting and not all(task.done() for task in tasks):
                    self._aborting = True
                    await self.engine.abort()
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        left = [result for task in tasks if isinstance(result := task.result(), Unfinished)]
        self._unfinished.extend(left)
        return kept

    def _keeps(self, group: Group) -> bool:
        right = sum(trajectory.accuracy or 0 for trajectory in group.trajectories)
        if not self.settings.dynamic_sampling or 0 < right < len(group.trajectories):
            self.statistics["groups_kept"] += 1
            return True
        self.statistics["groups_all_right" if right else "groups_all_wrong"] += 1
        return False

    async def _complete(self, one: Unfinished) -> Group | Unfinished:
        """All responses to a prompt; what there is of them where they were aborted."""
        found = await asyncio.gather(*(self._respond(draft) for draft in one.drafts))
        finished = [*one.finished, *(result for result in found if isinstance(result, Trajectory))]
        drafts = [result for result in found if isinstance(result, Draft)]
        if not drafts:
            return Group(one.prompt, tuple(sorted(finished, key=lambda trajectory: trajectory.sample)))
        if not self.settings.max_staleness:
            return Unfinished(one.prompt, (), tuple(Draft.new(one.prompt, d.sample) for d in one.drafts))
        return Unfinished(one.prompt, tuple(finished), tuple(drafts))

    async def _respond(self, draft: Draft) -> Trajectory | Draft:
        """One response, begun anew as often as somebody else aborts it."""
        while True:
            if self._aborting:
                return draft
            generation = await self.engine.generate(self._request(draft))
            start = len(draft.tokens)
            spans = [replace(span, start=span.start + start) for span in generation.spans]
            draft = Draft(
                draft.prompt,
                draft.sample,
                np.concatenate([draft.tokens, generation.tokens]),
                np.concatenate([draft.log_probs, generation.log_probs]),
                _joined([*draft.spans, *spans]),
                draft.interruptions + (generation.finish_reason == "abort"),
            )
            if generation.finish_reason != "abort":
                return await self._scored(draft, generation.finish_reason)
            self.statistics["responses_aborted"] += 1

    def _request(self, draft: Draft) -> GenerationRequest:
        prompt, sampling = draft.prompt, self.settings.sampling
        return GenerationRequest(
            id=f"{prompt.id}/{draft.sample}/{draft.interruptions}",
            group=prompt.id,
            tokens=np.concatenate([prompt.tokens, draft.tokens]),
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(draft.tokens)),
            seed=sampling_seed(self.settings.run_seed, prompt.id, draft.sample, draft.interruptions),
        )

    async def _scored(self, draft: Draft, reason: Any) -> Trajectory:
        if draft.interruptions:
            self.statistics["responses_continued"] += 1
        trajectory = Trajectory(
            prompt=draft.prompt,
            sample=draft.sample,
            tokens=draft.tokens,
            behaviour_log_probs=draft.log_probs,
            mask=np.ones(len(draft.tokens), np.bool_),
            spans=draft.spans,
            finish_reason=reason,
        )
        score = await self.scorer(trajectory)
        return replace(trajectory, reward=score.reward, accuracy=score.accuracy)


def _age(spans: Sequence[TokenSpan]) -> int:
    """The oldest version."""
    return min(span.weight_version for span in spans)


def _joined(spans: Sequence[TokenSpan]) -> tuple[TokenSpan, ...]:
    """Neighbours of one version are one span."""
    return tuple(s for i, s in enumerate(spans) if i == 0 or s.weight_version != spans[i - 1].weight_version)
