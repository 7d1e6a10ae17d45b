"""The settings of the sampler, and what it is given: a source of prompts and a scorer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fipo_megatron.data.trajectory import Prompt, Score, Trajectory
from fipo_megatron.rollout.engine import SamplingParameters

Scorer = Callable[[Trajectory], Awaitable[Score]]
"""Scores one response; must not raise because of its text."""


class PromptSource(Protocol):
    """A source of prompts, such as :class:`.data.prompts.PromptStream`.

    Attributes:
        given: Cursor: prompts returned so far. The sampler moves it back by prompts that it did not begin.
    """

    given: int

    def __call__(self, count: int) -> Sequence[Prompt]:
        """Returns this many new prompts; fewer if there are no more."""


@dataclass(frozen=True)
class SamplerSettings:
    """The settings of a sampler.

    Attributes:
        prompts_per_step: Number of groups of a step.
        samples_per_prompt: G, number of responses of a group.
        sampling: Sampling parameters; ``max_tokens`` is the limit of a whole response.
        run_seed: Seed of the run; see :func:`.engine.sampling_seed`.
        dynamic_sampling: Whether only groups that are neither all right nor all wrong are kept.
        max_batches: Most batches of prompts in a step.
        over_sampling: Oversampling factor. Once enough groups are kept, the rest are aborted.
        max_staleness: Largest age of a token's weights, in versions. With 0, aborted responses start from the prompt
            again, and complete groups are carried only while their weights are current.
        on_exhausted: Action after ``max_batches`` without enough groups: ``error``, or ``smaller`` for a smaller step.
        max_empty_steps: Steps in a row without any group after which ``smaller`` is an error, too.
        max_failure_fraction: Largest fraction of failed checks in a step.
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
    max_empty_steps: int = 10
    max_failure_fraction: float = 0.1
