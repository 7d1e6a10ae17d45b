"""Samples the responses of a batch of groups. Aborted responses are continued, or become partial responses."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.trajectory import FinishReason, Group, Score, TokenSpan, Trajectory
from fipo_megatron.observe import progress
from fipo_megatron.rollout.carry_over import PartialGroup, PartialResponse
from fipo_megatron.rollout.engine import (
    GenerationRequest,
    PermanentEngineError,
    RolloutEngine,
    SamplingParameters,
    sampling_seed,
)
from fipo_megatron.rollout.sampling_progress import SamplingProgress
from fipo_megatron.testing import fail_points

T = TypeVar("T")
GroupCallback = Callable[[Group], Awaitable[PartialGroup | None]]
"""Decides what follows from a complete group; may return a group that is to be sampled in its place."""


class GroupSampler:
    """Samples groups with one engine, and scores each response as soon as it is finished.

    Args:
        engine: Engine that samples the responses.
        sampling: Sampling parameters; ``max_tokens`` is the limit of a whole response.
        run_seed: Seed of the run; see :func:`.engine.sampling_seed`.
        keep_partial: Whether a partial group keeps its tokens; otherwise its responses start from the prompt again.
        scorer: Scores a response.
        counts: Counter to which sampled tokens, aborted and continued responses, and failed checks are added.
        checks: Counts to which every check is added.
        progress: Progress of this rank, to be updated.
        on_response: Called when a response is finished or aborted.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: SamplingParameters,
        *,
        run_seed: int,
        keep_partial: bool,
        scorer: Callable[[Trajectory], Awaitable[Score]],
        counts: Counter[str],
        checks: CheckCounts,
        progress: SamplingProgress,
        on_response: Callable[[], None],
    ) -> None:
        self._engine, self._sampling, self._run_seed = engine, sampling, run_seed
        self._keep_partial, self._scorer = keep_partial, scorer
        self._counts, self._progress, self._on_response = counts, progress, on_response
        self._checks, self._most_failures = checks, math.inf
        self._aborting = False

    async def sample_batch(
        self, groups: Sequence[PartialGroup], on_group: GroupCallback, most_failures: float = math.inf
    ) -> list[PartialGroup]:
        """Samples the missing responses of all groups.

        Args:
            groups: Groups to complete.
            on_group: Called with each group as soon as it is complete; may call :meth:`abort`, or return a group that
                is sampled, too.
            most_failures: Number of failed checks in this batch and before beyond which sampling ends.

        Returns:
            The groups that :meth:`abort` has left partial, in the order in which they were begun.

        Raises:
            EngineError: The engine failed.
            PermanentEngineError: The engine returned a response that cannot be used.
            VerifierError: There were more than ``most_failures`` failed checks.
        """
        self._aborting = False
        self._most_failures = most_failures
        tasks: list[asyncio.Task[PartialGroup | None]] = []
        with self._engine.driving(sum(len(group.partial) for group in groups)) as announce:

            async def decide(group: Group) -> None:
                replacement = await on_group(group)
                if replacement is not None:
                    announce(len(replacement.partial))
                    tasks.append(begin(self._sample_group(replacement, decide)))

            async with _tasks() as begin:
                tasks += [begin(self._sample_group(group, decide)) for group in groups]
        return [group for task in tasks if (group := task.result()) is not None]

    async def abort(self) -> None:
        """Aborts all responses in flight, and samples none until the next batch."""
        if not self._aborting:
            self._aborting = True
            await self._engine.abort()

    @property
    def aborting(self) -> bool:
        """Whether :meth:`abort` was called in this batch."""
        return self._aborting

    async def _sample_group(
        self, group: PartialGroup, on_group: Callable[[Group], Awaitable[None]]
    ) -> PartialGroup | None:
        """Samples the missing responses of a group; returns a partial group if any of them is aborted."""
        complete = list(group.finished)

        async def sample(response: PartialResponse) -> Trajectory | PartialResponse:
            with self._progress.response():
                response, request_id, reason = await self._continue(response)
                trajectory = _trajectory(response, reason)
                score = await self._scorer(trajectory) if trajectory is not None else None
            async with self._engine.deciding(request_id):
                self._on_response()
                if trajectory is None or score is None:
                    return response
                self._count(response, score)
                complete.append(scored := trajectory.with_score(score))
                if len(complete) == len(group.finished) + len(group.partial):
                    await on_group(Group(group.prompt, tuple(sorted(complete, key=lambda one: one.sample))))
                return scored

        async with _tasks() as begin:
            samples = [begin(sample(response)) for response in group.partial]
        found = [task.result() for task in samples]
        partial = tuple(one for one in found if isinstance(one, PartialResponse))
        if not partial:
            return None
        if not self._keep_partial:
            lengths = [len(one.tokens) for one in found if len(one.tokens)]
            self._counts["responses_restarted"] += len(lengths)
            self._counts["tokens_restarted"] += sum(lengths)
            restarted = tuple(PartialResponse.new(group.prompt, response.sample) for response in group.partial)
            return PartialGroup(group.prompt, (), restarted)
        finished = (*group.finished, *(one for one in found if isinstance(one, Trajectory)))
        return PartialGroup(group.prompt, finished, partial)

    async def _continue(self, response: PartialResponse) -> tuple[PartialResponse, str, FinishReason]:
        """Samples a response until it is finished, or until :meth:`abort`; other aborts only interrupt it.

        Returns:
            The response with all tokens, the id of its last request, and the reason why that ended.
        """
        request_id = ""
        while not self._aborting:
            request = self._request(response)
            request_id = request.id
            generation = await self._engine.generate(request)
            fail_points.reach("response")
            progress.sign()
            self._counts["tokens_sampled"] += len(generation.tokens)
            start = len(response.tokens)
            spans = [replace(span, start=span.start + start) for span in generation.spans]
            aborted = generation.finish_reason == "abort"
            # Whether a request that is aborted before its first token was made at all may depend on time.
            interrupted = aborted and len(generation.tokens) > 0
            response = PartialResponse(
                response.prompt,
                response.sample,
                np.concatenate([response.tokens, generation.tokens]),
                np.concatenate([response.log_probs, generation.log_probs]),
                _merge_spans([*response.spans, *spans]),
                response.interruptions + interrupted,
            )
            if not aborted:
                return response, request_id, generation.finish_reason
            self._counts["responses_aborted"] += interrupted
        return response, request_id, "abort"

    def _request(self, response: PartialResponse) -> GenerationRequest:
        prompt, sampling = response.prompt, self._sampling
        return GenerationRequest(
            id=f"{prompt.id}/{response.sample}/{response.interruptions}",
            group=prompt.id,
            tokens=np.concatenate([prompt.tokens, response.tokens]),
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(response.tokens)),
            seed=sampling_seed(self._run_seed, prompt.id, response.sample, response.interruptions),
        )

    def _count(self, response: PartialResponse, score: Score) -> None:
        """Counts a scored response; raises VerifierError if too many checks have failed."""
        self._progress.complete(len(response.tokens))
        if response.interruptions:
            self._counts["responses_continued"] += 1
        if score.asked:
            self._checks.add(score.failure, score.failure_text)
        if score.failure:
            self._counts[f"failures_{score.failure}"] += 1
            if self._checks.failed > self._most_failures:
                raise VerifierError(score.failure_text)
        self._counts["responses_sampled"] += 1
        self._counts["response_tokens_sampled"] += len(response.tokens)
        self._counts["responses_judged"] += score.accuracy is not None
        self._counts["responses_right"] += score.accuracy or 0


@asynccontextmanager
async def _tasks() -> AsyncIterator[Callable[[Coroutine[Any, Any, T]], asyncio.Task[T]]]:
    """Yields a function that begins a task, and waits for all tasks; if one fails, cancels the others and raises.

    A task may begin others. Unlike in asyncio.TaskGroup, the error is that of the task, and a cancellation stays one.
    """
    tasks: dict[asyncio.Task[Any], None] = {}  # in the order of their beginning

    def begin(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        tasks[task] = None
        return task

    async def errors(until: str) -> list[BaseException]:
        done, _ = await asyncio.wait(tasks, return_when=until)
        ended = [task for task in tasks if task in done]
        for task in ended:
            del tasks[task]
        return [error for task in ended if not task.cancelled() and (error := task.exception()) is not None]

    try:
        yield begin
        while tasks:
            for error in await errors(asyncio.FIRST_COMPLETED):
                raise error
    finally:
        while tasks:
            for task in tasks:
                task.cancel()
            await errors(asyncio.ALL_COMPLETED)  # only the first error is raised


def _trajectory(response: PartialResponse, reason: FinishReason) -> Trajectory | None:
    """Returns a finished response as a trajectory without a score; None for an aborted one.

    Raises:
        PermanentEngineError: The engine returned values that cannot be learned from.
    """
    if reason == "abort":
        return None
    try:
        return Trajectory(
            prompt=response.prompt,
            sample=response.sample,
            tokens=response.tokens,
            behaviour_log_probs=response.log_probs,
            mask=np.ones(len(response.tokens), np.bool_),
            spans=response.spans,
            finish_reason=reason,
        )
    except ValueError as error:
        raise PermanentEngineError(f"the engine returned a response that cannot be used: {error}") from error


def _merge_spans(spans: Sequence[TokenSpan]) -> tuple[TokenSpan, ...]:
    """Merges neighbouring spans of one version."""
    return tuple(s for i, s in enumerate(spans) if i == 0 or s.weight_version != spans[i - 1].weight_version)
