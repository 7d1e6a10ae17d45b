"""Conflicts within a configuration, and notices about values that are valid but surprising."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fipo_megatron.algorithm.policy_loss_config import KIND_DEFAULTS, PolicyLossConfig
from fipo_megatron.config.actor_sections import IMPORTANCE_CAP, ActorConfig, ParallelConfig
from fipo_megatron.config.padding import micro_batch_multiple
from fipo_megatron.config.rollout_sections import RolloutConfig
from fipo_megatron.config.urls import url_problem

if TYPE_CHECKING:
    from fipo_megatron.config.schema import Config


_FILTERED = (
    "tokens outside the nucleus are never drawn, and the log-probs of the others are those before filtering, so "
    "mismatch/* and algorithm.importance_cap do not show or correct this"
)
_PAPER = PolicyLossConfig()


def find_conflicts(config: Config) -> list[str]:
    """Lists every combination of values that cannot work, a line each: field, value and what would be valid."""
    algorithm, actor, rollout, reward = config.algorithm, config.actor, config.rollout, config.reward
    problems = []
    batch = "sft.examples_per_step" if algorithm.kind == "sft" else "rollout.prompts_per_step"
    if actor.prompts_per_mini_batch > config.groups_per_step:
        problems.append(
            f"actor.prompts_per_mini_batch = {actor.prompts_per_mini_batch}: must be at most "
            f"{batch} = {config.groups_per_step}"
        )
    elif algorithm.kind == "fipo" and config.updates_per_step == 1 and not algorithm.allow_inert:
        problems.append(
            f"actor.prompts_per_mini_batch = {actor.prompts_per_mini_batch}: one update per rollout step makes FIPO "
            "inert (π_θ = π_old, so every weight is 1); use at most half of rollout.prompts_per_step = "
            f"{rollout.prompts_per_step}, algorithm.kind=dapo, or algorithm.allow_inert=true"
        )
    if rollout.samples_per_prompt < 2 and algorithm.kind != "sft":
        problems.append(
            f"rollout.samples_per_prompt = {rollout.samples_per_prompt}: must be at least 2; an advantage compares the "
            "responses to one prompt"
        )
    if rollout.top_p < 1 and algorithm.kind != "sft" and not rollout.allow_top_p:
        problems.append(
            f"rollout.top_p = {rollout.top_p:g}: must be 1 in training; {_FILTERED}. Set "
            "rollout.allow_top_p=true to accept this; evaluation.top_p is a setting of its own"
        )
    if reward.overlong_buffer_tokens > rollout.max_response_tokens:
        problems.append(
            f"reward.overlong_buffer_tokens = {reward.overlong_buffer_tokens}: must be at most "
            f"rollout.max_response_tokens = {rollout.max_response_tokens}"
        )
    multiple = micro_batch_multiple(actor)
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if (padded := -(-longest // multiple) * multiple) > actor.token_budget:
        problems.append(
            f"actor.token_budget = {actor.token_budget}: must be at least data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}, padded for actor.parallel and actor.fp8 to a multiple of "
            f"{multiple}: {padded}"
        )
    return (
        problems
        + _actor_conflicts(actor)
        + _server_conflicts(rollout)
        + _url_conflicts(config)
        + _run_conflicts(config)
    )


def _run_conflicts(config: Config) -> list[str]:
    run, problems = config.run, []
    if run.replay and run.rollout_only:
        problems.append(
            f"run.replay = {run.replay}: cannot be combined with run.rollout_only; there would be nothing to do"
        )
    if run.replay and config.algorithm.kind == "sft":
        problems.append(f"run.replay = {run.replay}: must be null with algorithm.kind = sft, which reads data.files")
    if config.algorithm.kind == "sft" and config.algorithm.importance_cap is not None:
        problems.append(
            f"algorithm.importance_cap = {config.algorithm.importance_cap:g}: must be null with algorithm.kind = sft, "
            "which samples nothing"
        )
    if late := [step for step in run.profile if step >= run.steps]:
        problems.append(f"run.profile: step {late[0]} must be below run.steps = {run.steps}; steps are counted from 0")
    if run.evaluate_every and not config.evaluation.files:
        problems.append(f"run.evaluate_every = {run.evaluate_every}: needs evaluation.files")
    if run.evaluate_every and (run.replay or config.algorithm.kind == "sft"):
        problems.append(
            f"run.evaluate_every = {run.evaluate_every}: must be 0 with run.replay or algorithm.kind = sft, which have "
            "no engine"
        )
    if config.observe.trajectory_mib < config.observe.trajectory_file_mib:
        problems.append(
            f"observe.trajectory_mib = {config.observe.trajectory_mib:g}: must be at least "
            f"observe.trajectory_file_mib = {config.observe.trajectory_file_mib:g}"
        )
    if config.health.action == "roll_back" and (run.replay or config.algorithm.kind == "sft"):
        problems.append("health.action = roll_back: must be off, warn or stop with run.replay or algorithm.kind = sft")
    return problems


def _server_conflicts(rollout: RolloutConfig) -> list[str]:
    servers, problems = rollout.servers, []
    if servers.router and not servers.urls:
        problems.append(
            f"rollout.servers.router = {servers.router}: needs rollout.servers.urls, the URLs of all servers behind it"
        )
    if rollout.overlap and not rollout.max_staleness:
        problems.append("rollout.overlap = True: needs rollout.max_staleness of at least 1; tokens are one version old")
    if rollout.overlap and servers.colocated:
        problems.append(
            "rollout.overlap = True: must be false with rollout.servers.colocated, where engine and actor take turns"
        )
    if servers.colocated and servers.urls:
        problems.append("rollout.servers.colocated = True: must be false with rollout.servers.urls")
    if servers.colocated and rollout.engine == "embedded":
        problems.append("rollout.servers.colocated = True: must be false with rollout.engine = embedded")
    if servers.colocated and servers.sync == "distributed":
        problems.append(
            "rollout.servers.sync = distributed: must be tensor or disk with rollout.servers.colocated; NCCL allows "
            "one rank per GPU"
        )
    if "api_key" in rollout.sglang:
        problems.append(
            "rollout.sglang.api_key: must be in the environment variable that rollout.servers.api_key_variable = "
            f"{servers.api_key_variable} names; a configuration is written to files"
        )
    if servers.nccl_version is not None and not servers.urls:
        problems.append(
            f"rollout.servers.nccl_version = {servers.nccl_version}: must be null without rollout.servers.urls; "
            "servers that the run starts are asked for it"
        )
    if not servers.urls:
        problems += [
            f"rollout.sglang.{name} = {value!r}: must be 1 for servers that the run starts; rollout.servers.per_host "
            "starts several servers"
            for name in ("dp_size", "pp_size", "nnodes")
            if (value := rollout.sglang.get(name, 1)) != 1
        ]
    return problems


def _url_conflicts(config: Config) -> list[str]:
    servers, compare = config.rollout.servers, config.compare
    fields = {
        "rollout.servers.urls": servers.urls,
        "rollout.servers.router": (servers.router,) if servers.router else (),
        "compare.base_urls": compare.base_urls,
        "compare.rl_urls": compare.rl_urls,
    }
    return [
        f"{name} = {url}: {problem}" for name, urls in fields.items() for url in urls if (problem := url_problem(url))
    ]


def _actor_conflicts(actor: ActorConfig) -> list[str]:
    optimizer, problems = actor.optimizer, layout_conflicts(actor.parallel)
    if optimizer.schedule != "constant" and optimizer.decay_steps <= optimizer.warmup_steps:
        problems.append(
            f"actor.optimizer.decay_steps = {optimizer.decay_steps}: must be more than actor.optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} with actor.optimizer.schedule = {optimizer.schedule}"
        )
    if optimizer.min_lr > optimizer.lr:
        problems.append(
            f"actor.optimizer.min_lr = {optimizer.min_lr:g}: must be at most actor.optimizer.lr = {optimizer.lr:g}"
        )
    if actor.fp8 != "off" and actor.dtype != "bfloat16":
        problems.append(f"actor.dtype = {actor.dtype}: must be bfloat16 with actor.fp8 = {actor.fp8}")
    if actor.fp8 != "off" and actor.fp8_recipe == "delayed" and actor.fp8_bf16_first_last:
        problems.append(
            f"actor.fp8_bf16_first_last = {actor.fp8_bf16_first_last}: must be 0 with actor.fp8_recipe = delayed; "
            "blockwise and tensorwise can leave layers in bfloat16"
        )
    return problems


def layout_conflicts(parallel: ParallelConfig, world_size: int | None = None) -> list[str]:
    """Lists every reason why a parallel layout cannot be set up, one line each.

    Args:
        parallel: The layout.
        world_size: Number of ranks to split; None if it is not known yet.
    """
    problems = []
    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        problems.append(
            "actor.parallel.sequence_parallel = True: needs actor.parallel.tensor_parallel of at least 2; it splits "
            "activations over those ranks"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline_parallel == 1:
        problems.append(
            f"actor.parallel.virtual_pipeline = {parallel.virtual_pipeline}: must be 1 without "
            "actor.parallel.pipeline_parallel"
        )
    if world_size is None:
        return problems
    sizes = {name: getattr(parallel, name) for name in ("tensor_parallel", "pipeline_parallel", "context_parallel")}
    model_ranks = math.prod(sizes.values())
    if world_size % model_ranks:
        named = " × ".join(f"{name} = {size}" for name, size in sizes.items())
        problems.append(f"actor.parallel: {named} needs a multiple of {model_ranks} ranks, there are {world_size}")
        return problems
    stage_ranks = world_size // parallel.pipeline_parallel
    if stage_ranks % (parallel.expert_parallel * parallel.expert_tensor_size):
        problems.append(
            f"actor.parallel.expert_parallel = {parallel.expert_parallel}: times expert_tensor_parallel = "
            f"{parallel.expert_tensor_size} must divide the {stage_ranks} ranks of a pipeline stage"
        )
    return problems


def notices(config: Config) -> list[str]:
    """Lists what is valid but worth knowing at start-up, a sentence each."""
    a = config.algorithm
    found = []
    if a.kind == "fipo" and a.safety_threshold >= a.dual_clip and a.safety_threshold != _PAPER.safety_threshold:
        found.append(
            f"algorithm.safety_threshold = {a.safety_threshold:g} has no effect on the gradient: it is at least "
            f"dual_clip = {a.dual_clip:g}, and dual-clipped tokens have none"
        )
    if a.kind == "fipo" and a.weight_clip is not None and not a.weight_clip[0] <= 1 <= a.weight_clip[1]:
        found.append(
            f"algorithm.weight_clip = {list(a.weight_clip)} does not contain 1: it rescales every token, even where "
            "the policy has not changed"
        )
    found += [
        f"algorithm.{key} = {getattr(a, key)}: {a.kind} has {default}"
        for key, default in KIND_DEFAULTS[a.kind].items()
        if getattr(a, key) != default
    ]
    if a.kl_coef and a.kl_estimator == "k1":
        found.append("algorithm.kl_estimator = k1 has zero expected gradient as a loss term; use k2 or k3")
    if config.rollout.top_p < 1 and a.kind != "sft":
        found.append(f"rollout.top_p = {config.rollout.top_p:g}: {_FILTERED}")
    staleness = config.rollout.max_staleness
    if staleness and a.importance_cap is None:
        found.append(
            f"rollout.max_staleness = {staleness} without algorithm.importance_cap: tokens of older weights are "
            "trained on as if the current weights had sampled them"
        )
    elif staleness:
        found.append(
            f"algorithm.importance_cap = {a.importance_cap:g} is in effect; its default is {IMPORTANCE_CAP:g} with "
            f"rollout.max_staleness = {staleness}, and null with 0"
        )
    least = 1 + config.rollout.overlap
    if a.kind != "sft" and config.rollout.over_sampling > 1 and staleness < least:
        found.append(
            f"rollout.over_sampling = {config.rollout.over_sampling:g} with rollout.max_staleness = {staleness} learns "
            "from short responses more often than from long ones: groups beyond the need are dropped with every update "
            "of the weights, and aborted responses start again; rollout.max_staleness of at least "
            f"{least} carries both over"
        )
    left_over = config.groups_per_step % config.actor.prompts_per_mini_batch
    if left_over:
        batch = "sft.examples_per_step" if a.kind == "sft" else "rollout.prompts_per_step"
        found.append(
            f"actor.prompts_per_mini_batch = {config.actor.prompts_per_mini_batch} does not divide "
            f"{batch} = {config.groups_per_step}: the last update sees {left_over} prompts"
        )
    return found
