"""Samples k answers to each problem, checks and counts them. The leaders share the problems."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fipo_megatron.config import Config
from fipo_megatron.data.failed_checks import CheckCounts, VerifierError
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.evaluation.answer_normalisation import normalise_answer
from fipo_megatron.evaluation.estimates import vote
from fipo_megatron.evaluation.results import Evaluation, ProblemResult, data_set_name
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.rollout.engine import (
    Generation,
    GenerationRequest,
    ResponseEngine,
    SamplingParameters,
    sampling_seed,
)
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """A checked response.

    Attributes:
        right: The verifier's verdict.
        answer: Normalised answer that the response votes for; None without an answer.
        tokens: Length in tokens.
        truncated: Whether the response was cut off at the length limit.
        failure: Kind of failure of a check without a verdict; empty if there is a verdict.
        detail: Error text of the failure.
        asked: Whether the verifier was asked.
        trajectory: Tokens of the response; None if they are not kept.
        generation: Result of the engine; None if it is not kept.
    """

    right: bool
    answer: str | None
    tokens: int
    truncated: bool
    failure: str = ""
    detail: str = ""
    asked: bool = True
    trajectory: Trajectory | None = None
    generation: Generation | None = None


ResponseCallback = Callable[[Response], None]
"""Receives every response once it is checked."""


async def evaluate(
    problems: Sequence[Prompt],
    engine: ResponseEngine | None,
    coordinator: StoreCoordinator,
    scorer: ResponseScorer,
    config: Config,
    stop_token_ids: Sequence[int],
    progress: ResponseCallback = lambda response: None,
) -> Evaluation:
    """Evaluates the policy on a list of problems. Every rank calls it and returns the same result.

    Args:
        problems: Problems, the same on every rank.
        engine: Engine of this rank; None on ranks that do not lead.
        coordinator: Coordinator of the leaders.
        scorer: Scorer of this rank.
        config: Configuration of the run; ``evaluation``, ``rollout.max_response_tokens`` and ``reward.verifier`` are
            read.
        stop_token_ids: Tokens that end a response.
        progress: Callback for each of this rank's responses.

    Returns:
        Results in the order of ``problems``.

    Raises:
        EngineError: An engine failed.
        VerifierError: More than ``reward.max_failure_fraction`` of the checks failed, or the verifier of a rank does
            not work; on all ranks.
    """
    results: list[ProblemResult] = []
    checks = CheckCounts()
    most_failures = config.reward.max_failure_fraction * len(problems) * config.evaluation.samples_per_prompt

    def count(response: Response) -> None:
        if response.asked:
            checks.add(response.failure, response.detail)
        if checks.failed > most_failures:
            raise checks.error(config.reward.max_failure_fraction)
        progress(response)

    error: Exception | None = None
    verifier_failure = ""
    if coordinator.rank in coordinator.leaders:
        assert engine is not None
        share = problems[coordinator.leaders.index(coordinator.rank) :: len(coordinator.leaders)]
        try:
            async with coordinator.alive():
                results = await _answer_all(share, engine, scorer, config, stop_token_ids, count)
        except VerifierError as failure:
            verifier_failure = str(failure)
        except Exception as failure:
            error = failure
    report = {"results": [asdict(result) for result in results], "checks": checks, "failure": verifier_failure}
    parts = await coordinator.gather(report, error)
    _check_reports(parts, config.reward.max_failure_fraction, warns=coordinator.rank == 0)
    by_id = {row["id"]: ProblemResult(**row) for part in parts for row in part["results"]}
    return Evaluation(tuple(by_id[prompt.id] for prompt in problems))


def _check_reports(parts: Sequence[dict[str, Any]], largest_fraction: float, *, warns: bool) -> None:
    """Raises VerifierError if too many checks failed or a verifier does not work; else warns of each kind of failure.

    Args:
        parts: Reports of the leaders.
        largest_fraction: Largest accepted fraction of failed checks.
        warns: Whether this rank warns.
    """
    checks = CheckCounts.total(CheckCounts(**part["checks"]) for part in parts)
    if checks.exceeds(largest_fraction):
        raise checks.error(largest_fraction)
    if failures := [part["failure"] for part in parts if part["failure"]]:
        raise VerifierError(failures[0])
    if warns:
        for kind in checks.failures:
            logger.warning("evaluation: %s; they are left out", checks.warning(kind))


async def _answer_all(
    problems: Sequence[Prompt],
    engine: ResponseEngine,
    scorer: ResponseScorer,
    config: Config,
    stop_token_ids: Sequence[int],
    progress: ResponseCallback,
) -> list[ProblemResult]:
    """Answers all problems concurrently. If one response fails, the others are cancelled."""
    settings = config.evaluation
    sampling = SamplingParameters(
        settings.temperature, config.rollout.max_response_tokens, settings.top_p, tuple(stop_token_ids)
    )

    async def answer(prompt: Prompt, sample: int) -> Response:
        seed = sampling_seed(config.seed, f"evaluation/{prompt.id}", sample, 0)
        response = await _answer(prompt, sample, engine, scorer, sampling, seed, config.reward.verifier)
        progress(response)
        return replace(response, trajectory=None, generation=None)  # only the callback needs the tokens

    k = settings.samples_per_prompt
    tasks = [asyncio.create_task(answer(prompt, sample)) for prompt in problems for sample in range(k)]
    try:
        responses = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [_count(prompt, responses[k * i : k * (i + 1)]) for i, prompt in enumerate(problems)]


async def _answer(
    prompt: Prompt,
    sample: int,
    engine: ResponseEngine,
    scorer: ResponseScorer,
    sampling: SamplingParameters,
    seed: int,
    verifier: str,
) -> Response:
    group = f"evaluation/{prompt.id}"
    completion = await engine.generate(GenerationRequest(f"{group}/{sample}", group, prompt.tokens, sampling, seed))
    trajectory = Trajectory(
        prompt=prompt,
        sample=sample,
        tokens=completion.tokens,
        behaviour_log_probs=completion.log_probs,
        mask=np.ones(len(completion.tokens), np.bool_),
        finish_reason=completion.finish_reason,
    )
    verdict = await scorer.verdict(trajectory)
    return Response(
        verdict.correct,
        normalise_answer(verifier, verdict.extracted),
        len(completion.tokens),
        completion.finish_reason == "length",
        verdict.failure,
        verdict.detail,
        scorer.asks(trajectory),
        trajectory,
        completion,
    )


def _count(prompt: Prompt, responses: Sequence[Response]) -> ProblemResult:
    checked = [response for response in responses if not response.failure]
    right = [response.right for response in checked]
    return ProblemResult.of(
        data_set_name(prompt.data_source),
        prompt.id,
        prompt.ground_truth,
        right,
        [response.tokens for response in responses],
        sum(response.truncated for response in responses),
        vote([response.answer for response in checked], right),
    )
