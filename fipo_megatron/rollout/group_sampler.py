"""Samples the responses of one group. A response that is aborted is continued, or returned as a partial response."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.trajectory import FinishReason, Group, Score, TokenSpan, Trajectory
from fipo_megatron.rollout.carry_over import PartialGroup, PartialResponse
from fipo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters, sampling_seed
from fipo_megatron.rollout.sampling_progress import SamplingProgress
from fipo_megatron.testing import fail_points


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

    def begin_batch(self, most_failures: float = math.inf) -> None:
        """Allows sampling again after :meth:`abort`.

        Args:
            most_failures: Number of failed checks of this rank in the step beyond which sampling ends with
                VerifierError.
        """
        self._aborting = False
        self._most_failures = most_failures

    async def abort(self) -> None:
        """Aborts all responses in flight, and samples none until :meth:`begin_batch`."""
        if not self._aborting:
            self._aborting = True
            await self._engine.abort()

    async def sample(self, group: PartialGroup) -> Group | PartialGroup:
        """Samples the missing responses of a group; returns a partial group if any of them is aborted."""
        tasks = [asyncio.ensure_future(self._sample_response(response)) for response in group.partial]
        try:
            found = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finished = [*group.finished, *(result for result in found if isinstance(result, Trajectory))]
        partial = [result for result in found if isinstance(result, PartialResponse)]
        if not partial:
            return Group(group.prompt, tuple(sorted(finished, key=lambda trajectory: trajectory.sample)))
        if not self._keep_partial:
            restarted = tuple(PartialResponse.new(group.prompt, response.sample) for response in group.partial)
            return PartialGroup(group.prompt, (), restarted)
        return PartialGroup(group.prompt, tuple(finished), tuple(partial))

    async def _sample_response(self, response: PartialResponse) -> Trajectory | PartialResponse:
        with self._progress.response():
            found = await self._continue(response)
        if isinstance(found, Trajectory):
            self._progress.complete(len(found.tokens))
        self._on_response()
        return found

    async def _continue(self, response: PartialResponse) -> Trajectory | PartialResponse:
        """Samples a response until it is finished, or until :meth:`abort`; other aborts only interrupt it."""
        while True:
            if self._aborting:
                return response
            generation = await self._engine.generate(self._request(response))
            fail_points.reach("response")
            self._counts["tokens_sampled"] += len(generation.tokens)
            start = len(response.tokens)
            spans = [replace(span, start=span.start + start) for span in generation.spans]
            response = PartialResponse(
                response.prompt,
                response.sample,
                np.concatenate([response.tokens, generation.tokens]),
                np.concatenate([response.log_probs, generation.log_probs]),
                _merge_spans([*response.spans, *spans]),
                response.interruptions + (generation.finish_reason == "abort"),
            )
            if generation.finish_reason != "abort":
                return await self._score(response, generation.finish_reason)
            self._counts["responses_aborted"] += 1

    def _request(self, response: PartialResponse) -> GenerationRequest:
        prompt, sampling = response.prompt, self._sampling
        return GenerationRequest(
            id=f"{prompt.id}/{response.sample}/{response.interruptions}",
            group=prompt.id,
            tokens=np.concatenate([prompt.tokens, response.tokens]),
            sampling=replace(sampling, max_tokens=sampling.max_tokens - len(response.tokens)),
            seed=sampling_seed(self._run_seed, prompt.id, response.sample, response.interruptions),
        )

    async def _score(self, response: PartialResponse, reason: FinishReason) -> Trajectory:
        if response.interruptions:
            self._counts["responses_continued"] += 1
        trajectory = Trajectory(
            prompt=response.prompt,
            sample=response.sample,
            tokens=response.tokens,
            behaviour_log_probs=response.log_probs,
            mask=np.ones(len(response.tokens), np.bool_),
            spans=response.spans,
            finish_reason=reason,
        )
        async with self._engine.deciding():
            score = await self._scorer(trajectory)
        if score.asked:
            self._checks.add(score.failure, score.failure_text)
        if score.failure:
            self._counts[f"failures_{score.failure}"] += 1
            if self._checks.failed > self._most_failures:
                raise VerifierError(score.failure_text)
        self._counts["responses_sampled"] += 1
        self._counts["response_tokens_sampled"] += len(trajectory.tokens)
        self._counts["responses_judged"] += score.accuracy is not None
        self._counts["responses_right"] += score.accuracy or 0
        learned = trajectory.mask if score.reward is not None else np.zeros_like(trajectory.mask)
        return replace(trajectory, reward=score.reward, accuracy=score.accuracy, mask=learned, failure=score.failure)


def _merge_spans(spans: Sequence[TokenSpan]) -> tuple[TokenSpan, ...]:
    """Merges neighbouring spans of one version."""
    return tuple(s for i, s in enumerate(spans) if i == 0 or s.weight_version != spans[i - 1].weight_version)
