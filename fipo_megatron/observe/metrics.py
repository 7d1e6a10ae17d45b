"""The registry of metrics: tag, meaning, unit and condition of every number that a run reports.

The tags are those of TensorBoard and the keys of ``metrics.jsonl``, ``evaluation.jsonl`` and ``timing.jsonl``;
docs/metrics.md is generated from this registry, and tests compare it with what a run reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from fipo_megatron.algorithm.loss_statistics import QUANTILES, SIGNS

GROUPS = {
    "rollout": "Responses that a step trains on.",
    "sampler": "Counts of dynamic sampling over all leaders.",
    "policy": "Updates of a step: token means are averaged over the updates; minima and maxima are taken over all.",
    "future_kl": "Future-KL of the tokens and the weight derived from it; means are over tokens.",
    "mismatch": "Difference between the log-probs of the engine and of the trainer before the first update.",
    "probe": "Difference between the log-probs of trainer and engine after the weights were sent, over the tokens of 8 "
    "responses (`rollout.servers.probe_tokens`).",
    "optimizer": "Optimizer updates of a step.",
    "noise": "Noise floor: the difference of two passes at equal weights (`run.noise_floor_every`), beside the drift.",
    "health": "Inputs of the collapse alarm.",
    "moments": "Answers within the responses scored in a step, all leaders together (docs/what_rl_changed.md).",
    "evaluation": "Results on held-out problems with the weights at the beginning of the step.",
    "time": "Seconds per step on rank 0.",
    "throughput": "Rates of all ranks together.",
    "run": "The run as a whole.",
}
"""Description of each group of tags."""

FIPO, MISMATCH, KL, IMPORTANCE, SAMPLED = (
    "algorithm.kind = fipo",
    "responses sampled by an engine",
    "algorithm.kl_coef > 0",
    "algorithm.importance_cap",
    "steps with prompts and an engine",
)
NOISE, EVALUATED, SAVED, PEAK = (
    "steps of run.noise_floor_every",
    "steps of run.evaluate_every",
    "steps that save a checkpoint",
    "GPUs with a known peak",
)
DRIFT = "algorithm.kind other than sft"
BASELINE = "algorithm.kind = dapo or grpo"
FAILED = "failed checks"
DROPPED = "dropped responses"
LOST = "steps that learn nothing"
SMALLER = "steps with fewer groups than configured"
PROBED = "steps that send weights to SGLang servers"
VOTED = "verifiers that return a normalised answer"
HEALTH = "health.action other than off"
MOMENTS = "observe.moments"


@dataclass(frozen=True)
class Metric:
    """A number that a run reports.

    Attributes:
        tag: ``group/name``.
        text: Meaning, a sentence.
        unit: Unit of the number; empty for ratios and numbers without a unit.
        when: Condition under which it exists; empty: every training step.
    """

    tag: str
    text: str
    unit: str = ""
    when: str = ""

    @property
    def group(self) -> str:
        """Part of the tag before the first slash."""
        return self.tag.partition("/")[0]


def _moments() -> list[Metric]:
    counts = {
        "responses": "Responses that ended by themselves.",
        "answered": "Of these, with at least one candidate for the answer.",
        "several": "Of these, with at least two candidates.",
        "first_wrong": "With at least two candidates, the first one wrong.",
        "final_wrong": "With at least two candidates, the last one wrong.",
        "oops": "An earlier candidate is right, and the last one is wrong.",
        "oops_strict": "Oops with a reflection phrase in between.",
        "aha": "The first candidate is wrong, and the last one is right.",
        "aha_strict": "Aha with a reflection phrase in between.",
        "truncated": "Responses that were cut off at the length limit; they are in no other count.",
    }
    ends = {"": "", "_low": ", lower end of the 95 % interval", "_high": ", upper end of the 95 % interval"}
    return [
        *(Metric(f"moments/{name}", text, "", MOMENTS) for name, text in counts.items()),
        *(
            Metric(f"moments/{name}_fraction{end}", f"{name.title()} per response{text}.", "", MOMENTS)
            for name in ("oops", "aha")
            for end, text in ends.items()
        ),
        Metric(
            "moments/tokens_after_right_mean",
            "Mean number of tokens after the first right candidate, by its share of the characters.",
            "tokens",
            MOMENTS,
        ),
    ]


def _sampler() -> list[Metric]:
    return [
        *(Metric(f"sampler/{name}", text, "", SAMPLED) for name, text in SAMPLER_COUNTS.items()),
        Metric(
            "sampler/accuracy",
            "Fraction of right answers of all responses that the step completed, also of groups that were not kept.",
            "",
            SAMPLED,
        ),
        Metric("sampler/response_tokens_mean", "Mean length of the same responses.", "tokens", SAMPLED),
        *(Metric(f"sampler/{name}", text, "", f"{SAMPLED}, {FAILED}") for name, text in FAILURE_COUNTS.items()),
    ]


def _rollout() -> list[Metric]:
    return [
        Metric("rollout/accuracy", "Fraction of right answers.", "", SAMPLED),
        Metric("rollout/reward", "Mean reward, length penalty included.", "", SAMPLED),
        *(
            Metric(f"rollout/response_tokens_{name}", f"{text} response length.", "tokens", SAMPLED)
            for name, text in {
                "min": "Minimum",
                "q25": "First-quartile",
                "mean": "Mean",
                "median": "Median",
                "q75": "Third-quartile",
                "max": "Maximum",
            }.items()
        ),
        Metric("rollout/truncated_fraction", "Fraction of responses cut off at the length limit.", "", SAMPLED),
        Metric("rollout/groups", "Groups (prompts) that the step trains on.", "", SAMPLED),
        Metric("rollout/groups_missing", "Groups that the step lacks of `rollout.prompts_per_step`.", "", SMALLER),
        Metric("rollout/staleness_mean", "Mean age of the groups' oldest tokens in weight versions.", "", SAMPLED),
        Metric("rollout/staleness_max", "Maximum age of the groups' oldest tokens in weight versions.", "", SAMPLED),
    ]


SAMPLER_COUNTS = {
    "batches": "Prompt batches (generation batches) that the step drew.",
    "tokens_sampled": "Response tokens sampled, including those of dropped groups.",
    "groups_sampled": "Groups whose responses are complete.",
    "groups_kept": "Sampled groups that were kept: neither all right nor all wrong.",
    "groups_all_right": "Sampled groups whose responses are all right.",
    "groups_all_wrong": "Sampled groups whose responses are all wrong.",
    "groups_carried_in": "Surplus groups carried over from an earlier step.",
    "groups_carried_out": "Surplus groups carried over to the next step.",
    "groups_dropped_stale": "Carried-over groups dropped because they were too old.",
    "prompts_begun_early": "Prompts begun in place of dropped groups while other groups were being sampled.",
    "prompts_carried_in": "Unfinished prompts carried over from an earlier step.",
    "prompts_carried_out": "Unfinished prompts carried over to the next step.",
    "prompts_restarted_stale": "Unfinished prompts restarted because their responses were too old.",
    "responses_aborted": "Responses that had new tokens when they were aborted, once enough groups were complete.",
    "responses_continued": "Responses aborted in an earlier step and completed in this one.",
}

FAILURE_COUNTS = {
    "failures_timeout": "Checks that ran out of wall time.",
    "failures_memory": "Checks that needed more than `reward.verifier_memory_mib`.",
    "failures_crash": "Checks whose verifier process crashed.",
    "failures_error": "Checks in which the verifier raised or returned nonsense.",
    "failures_unreachable": "Checks whose service could not be reached.",
    "groups_unchecked": "Sampled groups whose checks all failed; they are dropped.",
}

DROPPED_COUNTS = {
    "dropped": "responses of complete groups that were dropped because they were too old",
    "restarted": "responses to unfinished prompts that start again, up to where they were aborted",
}

_POLICY = {
    "loss": Metric("policy/loss", "Loss: numerator over denominator of the global mini-batch."),
    "tokens": Metric("policy/tokens", "Tokens in the mask per update.", "tokens"),
    "sequences": Metric("policy/sequences", "Responses per update."),
    "dropped_sequences": Metric(
        "policy/dropped_sequences", "Responses per update that `sequence_drop` removed from the loss.", "", DRIFT
    ),
    "policy_kl": Metric("policy/policy_kl", "Mean of −d: the k1 estimate of KL(π_old ‖ π_θ).", "nats", DRIFT),
    "shift_abs_mean": Metric("policy/shift_abs_mean", "Mean |d|: drift of the policy within the step.", "nats", DRIFT),
    "shift_abs_max": Metric("policy/shift_abs_max", "Largest |d|.", "nats", DRIFT),
    "clip_fraction": Metric(
        "policy/clip_fraction", "Fraction of tokens whose clipped branch is the larger loss.", "", DRIFT
    ),
    "clip_fraction_low": Metric(
        "policy/clip_fraction_low", "Tokens with A < 0 and a ratio below 1 − ε_low, of all tokens.", "", DRIFT
    ),
    "clip_fraction_high": Metric(
        "policy/clip_fraction_high", "Tokens with A > 0 and a ratio above 1 + ε_high, of all tokens.", "", DRIFT
    ),
    "dual_clip_fraction": Metric(
        "policy/dual_clip_fraction", "Tokens with A < 0 and a ratio above `dual_clip`, of all tokens.", "", DRIFT
    ),
    "advantage_mean": Metric(
        "policy/advantage_mean", "Mean advantage over tokens: Σ A·L / Σ L with response lengths L.", "", DRIFT
    ),
    "entropy": Metric("policy/entropy", "Mean entropy of the policy per token.", "nats"),
    "reference_kl": Metric("policy/reference_kl", "KL divergence to the reference policy, as in the loss.", "nats", KL),
}

_FUTURE_KL = {
    "future_kl_mean": Metric("future_kl/mean", "Mean F.", "nats", DRIFT),
    "future_kl_abs_mean": Metric("future_kl/abs_mean", "Mean |F|.", "nats", DRIFT),
    "future_kl_abs_max": Metric("future_kl/abs_max", "Largest |F|.", "nats", DRIFT),
    "filtered_fraction": Metric(
        "future_kl/filtered_fraction", "Fraction of tokens left out of the sum (ratio > c).", "", DRIFT
    ),
    "weight_mean": Metric("future_kl/weight_mean", "Mean f as used in the loss.", "", FIPO),
    "weight_min": Metric("future_kl/weight_min", "Smallest f.", "", FIPO),
    "weight_max": Metric("future_kl/weight_max", "Largest f.", "", FIPO),
    "raw_weight_mean": Metric("future_kl/raw_weight_mean", "Mean exp F, before clipping.", "", DRIFT),
    "raw_weight_min": Metric("future_kl/raw_weight_min", "Smallest exp F.", "", DRIFT),
    "raw_weight_max": Metric("future_kl/raw_weight_max", "Largest exp F.", "", DRIFT),
    "weight_clip_fraction": Metric("future_kl/weight_clip_fraction", "Fraction of tokens with f on a bound.", "", FIPO),
    "weight_clip_fraction_upper": Metric(
        "future_kl/weight_clip_fraction_upper", "Fraction of tokens with f on the upper bound.", "", FIPO
    ),
    "weight_clip_fraction_lower": Metric(
        "future_kl/weight_clip_fraction_lower", "Fraction of tokens with f on the lower bound.", "", FIPO
    ),
    **{
        f"weight_clip_{sign}_{side}": Metric(
            f"future_kl/weight_clip_{sign}_{side}",
            f"Fraction of the tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'} whose f is on the {side} bound.",
            "",
            FIPO,
        )
        for sign in SIGNS
        for side in ("upper", "lower")
    },
    "safety_fraction": Metric(
        "future_kl/safety_fraction", "Fraction of tokens under the safety rule (A < 0, r > s).", "", FIPO
    ),
    "shadow_weight_mean": Metric(
        "future_kl/shadow_weight_mean", "Mean f that FIPO would use; the loss does not.", "", BASELINE
    ),
    "shadow_weight_min": Metric("future_kl/shadow_weight_min", "Smallest f that FIPO would use.", "", BASELINE),
    "shadow_weight_max": Metric("future_kl/shadow_weight_max", "Largest f that FIPO would use.", "", BASELINE),
    "shadow_weight_clip_fraction": Metric(
        "future_kl/shadow_weight_clip_fraction", "Fraction of tokens with that f on a bound.", "", BASELINE
    ),
    "inert_updates": Metric(
        "future_kl/inert_updates_fraction", "Fraction of the step's updates with f = 1 for every token.", "", FIPO
    ),
}

_MISMATCH = {
    "mismatch_abs_mean": Metric("mismatch/abs_mean", "Mean |log π_old − log π_behaviour|.", "nats", MISMATCH),
    "mismatch_abs_max": Metric("mismatch/abs_max", "Largest |log π_old − log π_behaviour|.", "nats", MISMATCH),
    "mismatch_kl": Metric("mismatch/kl", "k3 estimate of KL(π_behaviour ‖ π_old).", "nats", MISMATCH),
    "mismatch_future_kl_abs_mean": Metric(
        "mismatch/future_kl_abs_mean",
        "Mean |F| computed from the mismatch as if it were drift.",
        "nats",
        MISMATCH,
    ),
    "mismatch_future_kl_abs_max": Metric(
        "mismatch/future_kl_abs_max", "Largest |F| computed from the mismatch.", "nats", MISMATCH
    ),
    "importance_weight_mean": Metric(
        "mismatch/importance_weight_mean", "Mean truncated importance weight.", "", IMPORTANCE
    ),
    "importance_truncated_fraction": Metric(
        "mismatch/importance_truncated_fraction",
        "Fraction of tokens whose importance weight is at the cap.",
        "",
        IMPORTANCE,
    ),
}

_OPTIMIZER = {
    "grad_norm": Metric("optimizer/grad_norm", "Global gradient norm before clipping, mean over the updates."),
    "learning_rate": Metric("optimizer/learning_rate", "Learning rate of the last update of the step."),
    "updates": Metric("optimizer/updates", "Updates (mini-batches) of the step, including skipped ones."),
    "skipped": Metric(
        "optimizer/skipped_updates", "Updates skipped on all ranks: values were not finite, or no token was left."
    ),
}

_RATIOS = {
    f"ratio_{sign}_q{100 * q:g}": Metric(
        f"policy/ratio_{sign}_q{100 * q:g}",
        f"{100 * q:g} % quantile of the ratio of the tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'}.",
        "",
        f"{DRIFT}, tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'}",
    )
    for sign in SIGNS
    for q in QUANTILES
}

OF_UPDATES = _POLICY | _RATIOS | _FUTURE_KL | _MISMATCH | _OPTIMIZER
"""Metrics by their names in :mod:`.algorithm.loss_statistics` and :mod:`.observe.step_metrics`."""

_PROBE = [
    Metric("probe/abs_mean", "Mean |log π_θ − log π_behaviour|, at equal weights.", "nats", PROBED),
    Metric("probe/abs_q90", "90 % quantile of |log π_θ − log π_behaviour|, at equal weights.", "nats", PROBED),
    Metric("probe/abs_max", "Largest |log π_θ − log π_behaviour|, at equal weights; it has no bound.", "nats", PROBED),
]

_HEALTH = [
    Metric("health/low_clip", "Median of policy/clip_fraction_low over `health.window` steps.", "", HEALTH),
    Metric("health/policy_kl", "Median of |policy/policy_kl| over `health.window` steps.", "nats", HEALTH),
    Metric(
        "health/length_ratio",
        "Median of the mean response length over `health.window` steps, relative to its best in `health.length_steps`.",
        "",
        HEALTH,
    ),
    Metric(
        "health/accuracy_ratio",
        "Median of rollout/accuracy over `health.window` steps, relative to its best.",
        "",
        HEALTH,
    ),
    Metric(
        "health/lost_steps",
        "Steps in a row without a kept group and with few groups all right, or with all updates skipped.",
        "",
        f"{HEALTH}, {LOST}",
    ),
    Metric("health/alarm", "1 if the alarm triggers in this step, else 0.", "", HEALTH),
]

_NOISE = [
    Metric("noise/shift", "Largest |d| between two passes at equal weights.", "nats", NOISE),
    Metric("noise/future_kl", "Largest |F| between two passes at equal weights.", "nats", f"{NOISE}, {FIPO}"),
    Metric("noise/shift_ratio", "noise/shift over policy/shift_abs_max: noise over signal.", "", NOISE),
    Metric("noise/future_kl_ratio", "noise/future_kl over future_kl/abs_max.", "", f"{NOISE}, {FIPO}"),
]

OF_DATA_SETS = {
    "avg": "avg@k: fraction of right answers, k = `evaluation.samples_per_prompt`.",
    "avg_low": "avg@k: lower bound of the 95 % bootstrap interval over problems.",
    "avg_high": "avg@k: upper bound of the interval.",
    "cons": "cons@k: fraction of problems whose most frequent answer is right.",
    "cons_low": "cons@k: lower bound of the interval.",
    "cons_high": "cons@k: upper bound of the interval.",
    "pass": "pass@k: fraction of problems with at least one right answer.",
    "pass_low": "pass@k: lower bound of the interval.",
    "pass_high": "pass@k: upper bound of the interval.",
    "response_tokens": "Mean response length.",
    "truncated_fraction": "Fraction of responses cut off at the length limit.",
}

_EVALUATION = [
    Metric("evaluation/accuracy", "avg@k over the problems of all data sets.", "", EVALUATED),
    Metric("evaluation/response_tokens", "Mean response length over all data sets.", "tokens", EVALUATED),
    Metric(
        "evaluation/failed_checks",
        "Responses whose check failed; they are left out of avg@k, cons@k and pass@k.",
        "",
        f"{EVALUATED}, {FAILED}",
    ),
    *(
        Metric(
            f"evaluation/{{data_set}}/{name}",
            text,
            "tokens" if name == "response_tokens" else "",
            f"{EVALUATED}, {VOTED}" if name.startswith("cons") else EVALUATED,
        )
        for name, text in OF_DATA_SETS.items()
    ),
]

PARTS = {
    "sync": ("Sending the actor's weights to the engine, and handing over memory that they share.", SAMPLED),
    "evaluate": ("Evaluation.", EVALUATED),
    "generate": ("Sampling of responses; time that overlaps with training is not counted.", SAMPLED),
    "reward": ("Time with at least one answer being verified; part of generate.", SAMPLED),
    "log_probs": (
        "Log-prob passes: π_old for all mini-batches but the first, and the reference policy.",
        "algorithm.kind other than sft",
    ),
    "update": ("Forward and backward passes, and optimizer steps.", ""),
    "save": ("Time that the run waits for a checkpoint.", SAVED),
    "idle": ("Remaining time: waiting for other ranks, scattering of tokens, and bookkeeping.", ""),
    "observe": ("Writing of metrics, trajectories and trackers.", ""),
    "step": ("The whole step.", ""),
}

_TIME = [
    *(Metric(f"time/{name}", text, "s", when) for name, (text, when) in PARTS.items()),
    Metric(
        "throughput/generated_tokens_per_second",
        "Sampled response tokens over the seconds that sampling took.",
        "1/s",
        SAMPLED,
    ),
    Metric(
        "throughput/trained_tokens_per_second",
        "Tokens trained on, prompts included, over time/log_probs + time/update.",
        "1/s",
    ),
    Metric("throughput/tokens_per_second", "Tokens trained on, prompts included, over time/step.", "1/s"),
    Metric("throughput/mfu", "Model FLOP/s of log_probs and update over the GPUs' bf16 peak.", "", PEAK),
    Metric("throughput/cost_imbalance", "Model FLOPs of the most expensive data-parallel rank over the mean of all."),
    Metric(
        "throughput/idle_fraction",
        "Fraction of the passes in which an average data-parallel rank waits for the most expensive, by model FLOPs.",
    ),
    Metric("run/restarts", "Earlier starts of the run in `run.output`, after which it was resumed.", ""),
]

METRICS: tuple[Metric, ...] = (
    *_rollout(),
    *_sampler(),
    *_moments(),
    *(
        Metric(f"sampler/{name}_response_tokens_mean", f"Mean length of the {text}.", "tokens", f"{SAMPLED}, {DROPPED}")
        for name, text in DROPPED_COUNTS.items()
    ),
    *OF_UPDATES.values(),
    *_PROBE,
    *_NOISE,
    *_HEALTH,
    *_EVALUATION,
    *_TIME,
)
"""All scalars in the order of docs/metrics.md."""

HISTOGRAMS = (
    Metric("rollout/response_tokens", "Lengths of the responses that the step trains on.", "tokens", SAMPLED),
    Metric("policy/log_ratio_positive", "d of the tokens with A > 0.", "nats", "tokens with A > 0"),
    Metric("policy/log_ratio_negative", "d of the tokens with A ≤ 0.", "nats", "tokens with A ≤ 0"),
)
"""Histograms, which only TensorBoard and Weights & Biases receive."""

TEXTS = (Metric("samples/responses", "Some right and wrong responses of the step.", "", SAMPLED),)
"""Texts, which only TensorBoard and the tracking services receive."""
