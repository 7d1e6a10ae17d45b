"""Problems are shared among the leaders, each is answered k times, and the answers are checked and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.evaluation.answer_normalisation import normalise_answer
from fipo_megatron.evaluation.estimates import vote
from fipo_megatron.evaluation.results import Evaluation, ProblemResult, data_set_name
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters, sampling_seed
from fipo_megatron.rollout.store_coordinator import StoreCoordinator


@dataclass(frozen=True)
class Response:
    """A response, checked.

    Attributes:
        right: The verifier's verdict.
        answer: The normalised answer that it votes for; None if it has none.
        tokens: Its length.
        truncated: Whether it was cut off at the length limit.
    """

    right: bool
    answer: str | None
    tokens: int
    truncated: bool


ResponseCallback = Callable[[Response], None]
"""Is told of every response, as it is checked."""


async def evaluate(
    problems: Sequence[Prompt],
    engine: RolloutEngine | None,
    coordinator: StoreCoordinator,
    scoring: ResponseScorer,
    config: Config,
    stop_token_ids: Sequence[int],
    progress: ResponseCallback = lambda response: None,
) -> Evaluation:
    """On all ranks; every rank has the result.

    Args:
        problems: The same on every rank.
        engine: Of this rank; None where it does not lead.
        coordinator: Of the leaders.
        scoring: Of this rank.
        config: Of the run; ``evaluation``, ``rollout.max_response_tokens`` and ``reward.verifier`` are read.
        stop_token_ids: Responses end with one of these.
        progress: See :data:`ResponseCallback`; of this rank's responses.

    Raises:
        EngineError: of an engine.
    """
    mine: list[ProblemResult] = []
    error = None
    if coordinator.rank in coordinator.leaders:
        assert engine is not None
        share = problems[coordinator.leaders.index(coordinator.rank) :: len(coordinator.leaders)]
        try:
            async with coordinator.alive():
                mine = await _answer_all(share, engine, scoring, config, stop_token_ids, progress)
        except Exception as failed:
            error = failed
    parts = await coordinator.gather([asdict(one) for one in mine], error)
    found = {row["id"]: ProblemResult(**row) for part in parts for row in part}
    return Evaluation(tuple(found[prompt.id] for prompt in problems))


async def _answer_all(
    problems: Sequence[Prompt],
    engine: RolloutEngine,
    scoring: ResponseScorer,
    config: Config,
    stop_token_ids: Sequence[int],
    progress: ResponseCallback,
) -> list[ProblemResult]:
    """Where one response fails, the others are given up."""
    settings = config.evaluation
    sampling = SamplingParameters(
        settings.temperature, config.rollout.max_response_tokens, settings.top_p, tuple(stop_token_ids)
    )

    async def answer(prompt: Prompt, sample: int) -> Response:
        seed = sampling_seed(config.seed, f"evaluation/{prompt.id}", sample, 0)
        response = await _answer(prompt, sample, engine, scoring, sampling, seed, config.reward.verifier)
        progress(response)
        return response

    k = settings.samples_per_prompt
    tasks = [asyncio.create_task(answer(prompt, sample)) for prompt in problems for sample in range(k)]
    try:
        responses = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [_counted(prompt, responses[k * i : k * (i + 1)]) for i, prompt in enumerate(problems)]


async def _answer(
    prompt: Prompt,
    sample: int,
    engine: RolloutEngine,
    scoring: ResponseScorer,
    sampling: SamplingParameters,
    seed: int,
    verifier: str,
) -> Response:
    group = f"evaluation/{prompt.id}"
    found = await engine.generate(GenerationRequest(f"{group}/{sample}", group, prompt.tokens, sampling, seed))
    verdict = await scoring.verdict(
        Trajectory(
            prompt=prompt,
            sample=sample,
            tokens=found.tokens,
            behaviour_log_probs=found.log_probs,
            mask=np.ones(len(found.tokens), np.bool_),
            finish_reason=found.finish_reason,
        )
    )
    return Response(
        verdict.correct,
        normalise_answer(verifier, verdict.extracted),
        len(found.tokens),
        found.finish_reason == "length",
    )


def _counted(prompt: Prompt, responses: Sequence[Response]) -> ProblemResult:
    right = [one.right for one in responses]
    return ProblemResult.of(
        data_set_name(prompt.data_source),
        prompt.id,
        prompt.ground_truth,
        right,
        [one.tokens for one in responses],
        sum(one.truncated for one in responses),
        vote([one.answer for one in responses], right),
    )
