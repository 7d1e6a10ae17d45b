"""How often the policy is right: problems are shared among the leaders, each is answered k times."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParameters, sampling_seed
from fipo_megatron.rollout.exchange import Exchange
from fipo_megatron.scoring import Scoring


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        accuracy: avg@k: share of right answers.
        response_length: Mean, in tokens.
        right: Right answers to each problem, by its id.
    """

    accuracy: float
    response_length: float
    right: dict[str, int]


async def evaluate(
    problems: Sequence[Prompt],
    engine: RolloutEngine | None,
    exchange: Exchange,
    scoring: Scoring,
    config: Config,
    stop_token_ids: Sequence[int],
) -> Evaluation:
    """On all ranks; every rank has the result.

    Args:
        problems: The same on every rank.
        engine: Of this rank; None where it does not lead.
        exchange: Of the leaders.
        scoring: Of this rank.
        config: Of the run; ``evaluation`` is read.
        stop_token_ids: Responses end with one of these.

    Raises:
        EngineError: of an engine.
    """
    settings, mine, error = config.evaluation, [], None
    sampling = SamplingParameters(
        settings.temperature, config.rollout.max_response_tokens, settings.top_p, tuple(stop_token_ids)
    )

    async def answer(prompt: Prompt, sample: int) -> tuple[str, bool, int]:
        assert engine is not None
        request = GenerationRequest(
            id=f"evaluation/{prompt.id}/{sample}",
            group=f"evaluation/{prompt.id}",
            tokens=prompt.tokens,
            sampling=sampling,
            seed=sampling_seed(config.seed, f"evaluation/{prompt.id}", sample, 0),
        )
        found = await engine.generate(request)
        one = Trajectory(
            prompt=prompt,
            sample=sample,
            tokens=found.tokens,
            behaviour_log_probs=found.log_probs,
            mask=np.ones(len(found.tokens), np.bool_),
            finish_reason=found.finish_reason,
        )
        return prompt.id, await scoring.is_correct(one), len(found.tokens)

    if exchange.rank in exchange.leaders:
        share = problems[exchange.leaders.index(exchange.rank) :: len(exchange.leaders)]
        try:
            async with exchange.alive():
                mine = await asyncio.gather(
                    *(answer(prompt, sample) for prompt in share for sample in range(settings.samples_per_prompt))
                )
        except Exception as failed:
            error = failed
    everyone = [one for part in await exchange.gather(mine, error) for one in part]
    right = {prompt.id: 0 for prompt in problems}
    for id_, correct, _ in everyone:
        right[id_] += correct
    count = max(1, len(everyone))
    return Evaluation(sum(right.values()) / count, sum(length for _, _, length in everyone) / count, right)
