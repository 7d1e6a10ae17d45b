"""Checks that the engine serves the weights that were sent: compares the log-probs of a response with the actor's."""

from __future__ import annotations

import numpy as np

from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout.engine import EngineError, GenerationRequest, RolloutEngine, SamplingParameters


async def sample_probe(
    engine: RolloutEngine, prompt: Prompt, tokens: int, temperature: float, version: int
) -> Trajectory:
    """Samples a response to a prompt, with the engine's log-probs.

    Args:
        engine: Engine to check.
        prompt: Prompt of the response.
        tokens: Most tokens of the response.
        temperature: Sampling temperature.
        version: Version of the weights that the engine must have.

    Raises:
        EngineError: the engine cannot answer, or samples with other weights.
    """
    request = GenerationRequest(
        id=f"probe/{version}",
        group="probe",
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


def check_probe(difference: float, version: int, bound: float) -> float:
    """Checks the difference of engine and actor on the probe, and returns it.

    Args:
        difference: Largest absolute difference of the engine's and the actor's log-probs of the probe's tokens.
        version: Version of the weights, for the message.
        bound: Largest difference that is accepted.

    Raises:
        EngineError: the difference is above ``bound``, or not a number.
    """
    if not difference <= bound:
        raise EngineError(
            f"after the update to version {version}, the engine's log-probs differ from the actor's by "
            f"{difference:.3g}, more than rollout.servers.max_probe_shift = {bound:g}: it does not serve these weights"
        )
    return difference
