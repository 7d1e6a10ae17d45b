"""Checks that the engine serves the weights that were sent: compares log-probs of responses with the actor's.

Engine and actor round differently, and a rare token may differ by a whole nat although both have the same weights. So
the mean and a quantile over the tokens of several responses are bounded, and the maximum is only reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.engine import EngineError, GenerationRequest, RolloutEngine, SamplingParameters

RESPONSES = 8
"""Responses that are sampled, each to a prompt of its own, at the same time."""
QUANTILE = 0.9


@dataclass(frozen=True)
class ProbeShift:
    """Differences |log π_actor − log π_engine| over the tokens of a probe, in nats.

    Attributes:
        tokens: Number of tokens.
        mean: Mean.
        quantile: 90 % quantile.
        largest: Maximum.
    """

    tokens: int
    mean: float
    quantile: float
    largest: float

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> ProbeShift:
        """Returns the statistics of ``[tokens]`` differences in nats, at least one; NaN counts as inf."""
        finite = np.nan_to_num(differences, nan=np.inf)
        # One of the values: interpolation between inf and a number is NaN.
        quantile = np.quantile(finite, QUANTILE, method="lower")
        return cls(len(finite), float(finite.mean()), float(quantile), float(finite.max()))


async def sample_probe(
    engine: RolloutEngine, prompts: Sequence[Prompt], tokens: int, temperature: float, version: int
) -> list[Trajectory]:
    """Samples a response to each prompt, with the engine's log-probs.

    Args:
        engine: Engine to check.
        prompts: Prompts of the responses.
        tokens: Most tokens of each response.
        temperature: Sampling temperature.
        version: Version of the weights that the engine must have.

    Raises:
        EngineError: the engine cannot answer, or samples with other weights.
    """
    found = await asyncio.gather(
        *(_sample(engine, number, prompt, tokens, temperature, version) for number, prompt in enumerate(prompts)),
        return_exceptions=True,
    )
    responses = []
    for one in found:
        if isinstance(one, BaseException):
            raise one
        responses.append(one)
    return responses


async def _sample(
    engine: RolloutEngine, number: int, prompt: Prompt, tokens: int, temperature: float, version: int
) -> Trajectory:
    request = GenerationRequest(
        id=f"probe/{version}/{number}",
        group=f"probe/{number}",  # groups are spread over the servers
        tokens=prompt.tokens,
        sampling=SamplingParameters(temperature, tokens),
        seed=version,
    )
    found = await engine.generate(request)
    if {span.weight_version for span in found.spans} != {version}:
        raise EngineError(f"after the update to version {version}, the engine samples with {found.spans}")
    return Trajectory(
        prompt=prompt,
        sample=0,
        tokens=found.tokens,
        behaviour_log_probs=found.log_probs,
        mask=np.ones(len(found.tokens), np.bool_),
        spans=found.spans,
        finish_reason=found.finish_reason,
        advantage=0.0,
    )


def check_probe(differences: NDArray[np.float64], version: int, *, max_mean: float, max_quantile: float) -> ProbeShift:
    """Checks the differences of engine and actor on the probe, and returns their statistics.

    Args:
        differences: ``[tokens]`` absolute differences of the engine's and the actor's log-probs.
        version: Version of the weights, for the message.
        max_mean: Largest mean that is accepted.
        max_quantile: Largest 90 % quantile that is accepted.

    Raises:
        EngineError: mean or quantile is above its bound, or not a number.
    """
    shift = ProbeShift.of(differences)
    if shift.mean <= max_mean and shift.quantile <= max_quantile:
        return shift
    raise EngineError(
        f"after the update to version {version}, the engine's log-probs of {shift.tokens} tokens differ from the "
        f"actor's by {shift.mean:.3g} in the mean (rollout.servers.max_probe_mean_shift = {max_mean:g}), "
        f"{shift.quantile:.3g} at the 90 % quantile (rollout.servers.max_probe_quantile_shift = {max_quantile:g}) and "
        f"{shift.largest:.3g} at most: it does not serve these weights"
    )
