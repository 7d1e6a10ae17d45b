"""The sections about a run as a whole: ``run``, ``checkpoint``, ``observe``, ``health`` and ``compare``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fipo_megatron.config.field_types import (
    LARGEST_NUMBER,
    STRICT,
    Count,
    Fraction,
    NotNegative,
    Positive,
    PositiveNumber,
    Seed,
)


@dataclass(config=STRICT, frozen=True)
class RunConfig:
    """Length, output and mode of the run.

    Attributes:
        steps: Rollout steps, each with ``updates_per_step`` optimizer steps.
        output: Directory for everything that the run writes.
        evaluate_every: Steps between two evaluations; 0 disables evaluation.
        noise_floor_every: Steps between two reports of the noise floor, the difference of two passes at equal weights;
            0 disables the reports. The first step of every process that trains checks it regardless.
        record_rollouts: Keep the sampled responses of every step, for ``replay``.
        replay: Directory of recorded responses to train on instead of sampling.
        profile: Steps of which a trace of torch's profiler is written to ``profile/`` in ``run.output``.
        profile_ranks: Ranks that write traces: the ``first`` or ``all``.
        rollout_only: Sample and score responses without training.
        preflight: On a GPU, refuse to start if the actor does not fit its memory (``memory``), or start at once
            (``off``).
        hang_seconds: Seconds without progress on any rank after which the run writes the stacks of all ranks to
            ``stacks/`` in ``run.output`` and ends. Progress is a phase of a step that begins or ends, a micro-batch, a
            sampled token, or weights that are sent; it must be longer than the longest pause between two of them.
    """

    steps: Positive = 100
    output: str = "output"
    evaluate_every: Count = 0
    noise_floor_every: Count = 50
    record_rollouts: bool = False
    replay: str | None = None
    profile: tuple[Count, ...] = ()
    profile_ranks: Literal["first", "all"] = "first"
    rollout_only: bool = False
    preflight: Literal["memory", "off"] = "memory"
    hang_seconds: PositiveNumber = 1800.0


@dataclass(config=STRICT, frozen=True)
class CheckpointConfig:
    """Checkpoints, resuming from them, and exports as Hugging Face models.

    Attributes:
        save_every: Steps between two checkpoints; 0 saves only after the last step.
        async_save: Write checkpoints in the background, from a copy in host memory.
        keep_last: Number of newest checkpoints to keep. Up to two older ones stay for the collapse alarm to roll back
            to.
        keep_best: Also keep the checkpoint with the best evaluation accuracy.
        optimizer_sharding: Format of the distributed optimizer's state. ``fully_reshardable`` loads under any layout
            but is gathered on the hosts before it is written; ``dp_reshardable`` is written as it is, and tensor- and
            pipeline-parallel sizes must then stay the same.
        export_every: Steps between two exports as a Hugging Face model; 0 exports only after the last step.
        resume: ``auto`` resumes from the newest checkpoint in ``run.output`` if there is one; ``never`` requires a new
            or empty ``run.output``.
    """

    save_every: Count = 20
    async_save: bool = True
    keep_last: Positive = 2
    keep_best: bool = True
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    export_every: Count = 0
    resume: Literal["auto", "never"] = "auto"


@dataclass(config=STRICT, frozen=True)
class ObserveConfig:
    """Output for people and trackers, beside ``metrics.jsonl``, ``evaluation.jsonl`` and ``timing.jsonl``.

    Attributes:
        tensorboard: Write TensorBoard event files to ``tensorboard/`` in ``run.output``.
        trackers: Services that receive the same metrics; their packages must be installed.
        project: Project name of the run in these services.
        texts: Responses per step that TensorBoard and the services show, both right and wrong ones.
        trajectories: Responses per step written to ``trajectories/``, both right and wrong ones; 0 writes none.
        trajectories_every: Interval in steps between two writes of responses.
        trajectory_tokens: Also write log-probs, Future-KL, weight and entropy of every token of these responses.
        trajectory_file_mib: File size in MiB after which a new trajectory file is begun.
        trajectory_mib: Total size of the trajectory files in MiB; beyond it the oldest file is removed.
        moments: Find the answers within each response, judge them, and report Oops and Aha (``moments/*``). Responses
            with one answer cost no check.
        moments_extractor: Extractor of these answers: of ``boxed``, ``answer`` and ``phrase``, separated by commas, or
            ``python:MODULE.FUNCTION``.
        plain_console: Print plain log lines even on a terminal, without colours and progress bar.
    """

    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "swanlab"], ...] = ()
    project: str = "fipo_megatron"
    texts: Count = 4
    trajectories: Count = 8
    trajectories_every: Positive = 1
    trajectory_tokens: bool = False
    trajectory_file_mib: PositiveNumber = 32.0
    trajectory_mib: PositiveNumber = 256.0
    moments: bool = False
    moments_extractor: str = "boxed,answer,phrase"
    plain_console: bool = False


@dataclass(config=STRICT, frozen=True)
class HealthConfig:
    """The collapse alarm: many low-clipped tokens and a rising policy KL, while length or accuracy falls.

    Triggers if the medians of low-clip fraction and policy KL exceed their limits while length or accuracy falls below
    its ratio, or if the median of policy KL alone exceeds ``policy_kl_limit``. Medians are taken over ``window`` steps,
    so one bad step does not trigger it. Also triggers after ``window`` steps in a row that learned nothing, because all
    updates were skipped, or no group was kept and too few groups were all right.

    Attributes:
        action: Reaction to the alarm: log a warning (``warn``), save a checkpoint and end the run (``stop``), or
            return to an earlier checkpoint (``roll_back``). ``off`` disables the alarm.
        window: Number of steps for the medians.
        low_clip: Limit of the low-clip fraction: tokens with A < 0 clipped at 1 − ε_low, as a fraction of all tokens.
        policy_kl: Limit of the policy KL's absolute value: the mean of −d over the updates of a step, in nats.
        length_ratio: Lower limit of the mean response length, relative to its best value in ``length_steps``.
        length_steps: Steps within which the length must fall. A collapse is sudden; responses that become shorter over
            hundreds of steps are none.
        accuracy_ratio: Lower limit of the training accuracy, relative to its best value so far; in a step without a
            kept group, of the fraction of groups that are all right.
        policy_kl_limit: Limit of the policy KL's absolute value, in nats, that triggers the alarm by itself.
        max_roll_backs: Maximum number of returns to an earlier checkpoint; the next alarm ends the run.
        roll_back_lr: Factor that the learning rate is multiplied by at each return.
    """

    action: Literal["off", "warn", "stop", "roll_back"] = "stop"
    window: Positive = 3
    low_clip: NotNegative = 0.02
    policy_kl: NotNegative = 0.01
    length_ratio: Fraction = 0.75
    length_steps: Positive = 100
    accuracy_ratio: Fraction = 0.6
    policy_kl_limit: NotNegative = 0.1
    max_roll_backs: Positive = 2
    roll_back_lr: Fraction = 0.5


@dataclass(config=STRICT, frozen=True)
class CompareConfig:
    """Comparison of two models, token by token (``fipo compare``).

    Attributes:
        base: Hugging Face directory of the base model.
        rl: Hugging Face directory, or Megatron checkpoint (torch_dist), of the model that RL has trained.
        responses: Responses to compare on: trajectory files, recorded rollouts, or directories of runs or comparisons.
            If empty, the model that ``sampler`` names answers the problems in ``evaluation.files``.
        sampler: Model that answers the problems.
        temperature: Temperature of the compared distributions, for both models.
        top_k: Number of most likely tokens whose overlap is computed.
        name: Suffix of the result directory in ``run.output``, ``compare-NAME`` or ``swap-NAME``; null: the last part
            of ``rl``.
        direction: Primary model of ``fipo compare swap`` and the model that replaces its tokens: ``base_to_rl``,
            ``rl_to_base`` or ``both``.
        select: Quantities that select the positions to swap.
        share: Shares of the positions to select; each is calibrated to a threshold on responses of the primary model.
        threshold: Thresholds of the one quantity in ``select``, used instead of ``share``. Positions below are selected
            for ``delta``, and those above for the other quantities.
        seeds: Seeds of the responses; empty: ``seed`` alone.
        base_urls: URLs of running SGLang servers of the base model for ``fipo compare swap``; if empty, the program
            starts servers of both models.
        rl_urls: URLs of running SGLang servers of the model that RL has trained.
        draft_tokens: Most tokens that the primary model's server samples before the other model's server scores them.
            Does not change the distribution of the responses.
    """

    base: str = ""
    rl: str = ""
    responses: tuple[str, ...] = ()
    sampler: Literal["rl", "base"] = "rl"
    temperature: PositiveNumber = 1.0
    top_k: Positive = 10
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    direction: Literal["both", "base_to_rl", "rl_to_base"] = "both"
    select: tuple[Literal["delta", "js", "kl", "kl_reverse", "entropy", "random"], ...] = (
        "delta",
        "js",
        "kl",
        "kl_reverse",
        "entropy",
        "random",
    )
    share: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    threshold: tuple[Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, allow_inf_nan=False)], ...] = ()
    seeds: tuple[Seed, ...] = ()
    base_urls: tuple[str, ...] = ()
    rl_urls: tuple[str, ...] = ()
    draft_tokens: Positive = 32
