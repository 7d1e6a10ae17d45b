"""Every number that a run reports: its tag, what it means, and when it exists.

The tags are those of TensorBoard and the keys of ``metrics.jsonl``, ``evaluation.jsonl`` and ``timing.jsonl``;
docs/metrics.md is made from this table, and a run that reports anything else fails its tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from fipo_megatron.algorithm.loss_statistics import QUANTILES, SIGNS

GROUPS = {
    "rollout": "Of the responses that are learned from in a step.",
    "sampler": "Counts of dynamic sampling, over all leaders.",
    "policy": "Of the updates of a step: means over the updates of means over tokens; minima and maxima over all.",
    "future_kl": "The Future-KL of a token and the weight that follows from it, as means over tokens.",
    "mismatch": "How far the engine's log-probs are from the trainer's before the first update: not drift, noise.",
    "optimizer": "Of the updates of a step.",
    "noise": "What two passes at equal weights differ by, beside what FIPO takes for drift: `run.noise_floor_every`.",
    "health": "What the alarm for collapse looks at.",
    "evaluation": "On held-out problems, with the weights that the step begins with.",
    "time": "Seconds of a step, on rank 0.",
    "throughput": "Of all ranks together.",
}
"""What the groups of tags are about."""

FIPO, MISMATCH, KL, IMPORTANCE, SAMPLED = (
    "algorithm.kind = fipo",
    "responses that an engine sampled",
    "algorithm.kl_coef > 0",
    "algorithm.importance_cap",
    "a step with prompts and an engine",
)
NOISE, EVALUATED, SAVED, PEAK = (
    "steps of run.noise_floor_every",
    "steps of run.evaluate_every",
    "steps that save",
    "a GPU whose peak is known",
)
VOTED = "verifiers that say what the answer is"
HEALTH = "health.action other than off"


@dataclass(frozen=True)
class Metric:
    """A number that a run reports.

    Attributes:
        tag: ``group/name``.
        text: What it means.
        unit: Of the number; empty: a ratio or a number without a unit.
        when: Where it exists; empty: in every step that learns.
    """

    tag: str
    text: str
    unit: str = ""
    when: str = ""

    @property
    def group(self) -> str:
        """The part before the first slash."""
        return self.tag.partition("/")[0]


def _rollout() -> list[Metric]:
    return [
        Metric("rollout/accuracy", "Right answers, of those that are learned from.", "", SAMPLED),
        Metric("rollout/reward", "Mean reward, length penalty included.", "", SAMPLED),
        *(
            Metric(f"rollout/response_tokens_{name}", f"{text} of the lengths of responses.", "tokens", SAMPLED)
            for name, text in {
                "min": "Minimum",
                "q25": "First quartile",
                "mean": "Mean",
                "median": "Median",
                "q75": "Third quartile",
                "max": "Maximum",
            }.items()
        ),
        Metric("rollout/truncated_fraction", "Responses that were cut off at the length limit.", "", SAMPLED),
        Metric("rollout/groups", "Prompts whose groups are learned from.", "", SAMPLED),
        Metric("rollout/staleness_mean", "How many versions older than the step its oldest tokens are.", "", SAMPLED),
        Metric("rollout/staleness_max", "The same for the oldest group.", "", SAMPLED),
    ]


SAMPLER_COUNTS = {
    "batches": "Batches of prompts (generation batches) that the step took.",
    "tokens_sampled": "Response tokens that were sampled, those of groups that are not kept included.",
    "groups_sampled": "Groups whose responses were all sampled.",
    "groups_kept": "Of these, kept: neither all right nor all wrong.",
    "groups_all_right": "Of these, all right.",
    "groups_all_wrong": "Of these, all wrong.",
    "groups_carried_in": "Groups that an earlier step had kept beyond its need.",
    "groups_carried_out": "Groups kept beyond the need of this step.",
    "groups_dropped_stale": "Carried groups that were too old.",
    "prompts_carried_in": "Prompts that an earlier step had begun.",
    "prompts_carried_out": "Prompts that are begun and not finished.",
    "prompts_restarted_stale": "Begun prompts whose responses were too old and begin anew.",
    "responses_aborted": "Responses that were aborted because enough groups were complete.",
    "responses_continued": "Responses that had been aborted and are complete now.",
}

_POLICY = {
    "loss": Metric("policy/loss", "The loss: numerator over denominator of the global mini-batch."),
    "tokens": Metric("policy/tokens", "Tokens in the mask, per update.", "tokens"),
    "sequences": Metric("policy/sequences", "Responses, per update."),
    "dropped_sequences": Metric("policy/dropped_sequences", "Responses left out by `sequence_drop`, per update."),
    "policy_kl": Metric("policy/policy_kl", "Mean of −d: the k1 estimate of KL(π_old ‖ π_θ).", "nats"),
    "shift_abs_mean": Metric("policy/shift_abs_mean", "Mean |d|: how far the policy has drifted in the step.", "nats"),
    "shift_abs_max": Metric("policy/shift_abs_max", "Largest |d|.", "nats"),
    "clip_fraction": Metric("policy/clip_fraction", "Tokens whose clipped branch is the larger loss."),
    "clip_fraction_low": Metric("policy/clip_fraction_low", "Of all tokens, those with A < 0 below 1 − ε_low."),
    "clip_fraction_high": Metric("policy/clip_fraction_high", "Of all tokens, those with A > 0 above 1 + ε_high."),
    "dual_clip_fraction": Metric("policy/dual_clip_fraction", "Tokens with A < 0 and a ratio above `dual_clip`."),
    "advantage_mean": Metric("policy/advantage_mean", "Mean advantage over tokens: Σ A·L / Σ L, by length."),
    "entropy": Metric("policy/entropy", "Entropy of the policy per token.", "nats"),
    "reference_kl": Metric("policy/reference_kl", "The KL term to the reference policy.", "nats", KL),
}

_FUTURE_KL = {
    "future_kl_mean": Metric("future_kl/mean", "Mean F.", "nats", FIPO),
    "future_kl_abs_mean": Metric("future_kl/abs_mean", "Mean |F|.", "nats", FIPO),
    "future_kl_abs_max": Metric("future_kl/abs_max", "Largest |F|.", "nats", FIPO),
    "filtered_fraction": Metric("future_kl/filtered_fraction", "Tokens left out of the sum (ratio > c).", "", FIPO),
    "weight_mean": Metric("future_kl/weight_mean", "Mean f, as it is used.", "", FIPO),
    "weight_min": Metric("future_kl/weight_min", "Smallest f.", "", FIPO),
    "weight_max": Metric("future_kl/weight_max", "Largest f.", "", FIPO),
    "raw_weight_mean": Metric("future_kl/raw_weight_mean", "Mean exp F, before the clip.", "", FIPO),
    "raw_weight_min": Metric("future_kl/raw_weight_min", "Smallest exp F.", "", FIPO),
    "raw_weight_max": Metric("future_kl/raw_weight_max", "Largest exp F.", "", FIPO),
    "weight_clip_fraction": Metric("future_kl/weight_clip_fraction", "Tokens with f on a bound.", "", FIPO),
    "weight_clip_fraction_upper": Metric("future_kl/weight_clip_fraction_upper", "... on the upper bound.", "", FIPO),
    "weight_clip_fraction_lower": Metric("future_kl/weight_clip_fraction_lower", "... on the lower bound.", "", FIPO),
    **{
        f"weight_clip_{sign}_{side}": Metric(
            f"future_kl/weight_clip_{sign}_{side}",
            f"Of the tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'}, those with f on the {side} bound.",
            "",
            FIPO,
        )
        for sign in SIGNS
        for side in ("upper", "lower")
    },
    "safety_fraction": Metric("future_kl/safety_fraction", "Tokens under the safety rule (A < 0, r > s).", "", FIPO),
    "inert_updates": Metric(
        "future_kl/inert_updates_fraction", "Share of the step's updates with f = 1 for every token.", "", FIPO
    ),
}

_MISMATCH = {
    "mismatch_abs_mean": Metric("mismatch/abs_mean", "Mean |log π_old − log π_behaviour|.", "nats", MISMATCH),
    "mismatch_abs_max": Metric("mismatch/abs_max", "Largest of these.", "nats", MISMATCH),
    "mismatch_kl": Metric("mismatch/kl", "k3 estimate of KL(π_behaviour ‖ π_old).", "nats", MISMATCH),
    "mismatch_future_kl_abs_mean": Metric(
        "mismatch/future_kl_abs_mean", "Mean |F| of the mismatch: what it would add up to as drift.", "nats", FIPO
    ),
    "mismatch_future_kl_abs_max": Metric("mismatch/future_kl_abs_max", "Largest of these.", "nats", FIPO),
    "importance_weight_mean": Metric("mismatch/importance_weight_mean", "Mean truncated weight.", "", IMPORTANCE),
    "importance_truncated_fraction": Metric(
        "mismatch/importance_truncated_fraction", "Tokens whose weight is at the cap.", "", IMPORTANCE
    ),
}

_OPTIMIZER = {
    "grad_norm": Metric("optimizer/grad_norm", "Global gradient norm before clipping, mean over the updates."),
    "learning_rate": Metric("optimizer/learning_rate", "Of the last update of the step."),
    "updates": Metric("optimizer/updates", "Mini-batches of the step, skipped ones included."),
    "skipped": Metric("optimizer/skipped_updates", "Updates skipped on all ranks: not finite, or no token left."),
}

_RATIOS = {
    f"ratio_{sign}_q{100 * q:g}": Metric(
        f"policy/ratio_{sign}_q{100 * q:g}",
        f"{100 * q:g} % quantile of the ratio of tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'}.",
        "",
        f"tokens with {'A > 0' if sign == 'positive' else 'A ≤ 0'}",
    )
    for sign in SIGNS
    for q in QUANTILES
}

OF_UPDATES = _POLICY | _RATIOS | _FUTURE_KL | _MISMATCH | _OPTIMIZER
"""By the names that :mod:`.algorithm.loss_statistics` and :mod:`.observe.run_log` know them by."""

_HEALTH = [
    Metric("health/low_clip", "policy/clip_fraction_low, median of `health.window` steps.", "", HEALTH),
    Metric("health/policy_kl", "|policy/policy_kl|, median of `health.window` steps.", "nats", HEALTH),
    Metric("health/length_ratio", "Mean length, median of `health.window` steps, of its best so far.", "", HEALTH),
    Metric(
        "health/accuracy_ratio", "rollout/accuracy, median of `health.window` steps, of its best so far.", "", HEALTH
    ),
    Metric("health/alarm", "1 where the alarm is raised in this step, else 0.", "", HEALTH),
]

_NOISE = [
    Metric("noise/shift", "Largest |d| between two passes at equal weights.", "nats", NOISE),
    Metric("noise/future_kl", "Largest |F| between two passes at equal weights.", "nats", f"{NOISE}, {FIPO}"),
    Metric("noise/shift_ratio", "noise/shift over policy/shift_abs_max: noise over signal.", "", NOISE),
    Metric("noise/future_kl_ratio", "noise/future_kl over future_kl/abs_max.", "", f"{NOISE}, {FIPO}"),
]

OF_DATA_SETS = {
    "avg": "avg@k: share of right answers, k = `evaluation.samples_per_prompt`.",
    "avg_low": "avg@k: lower end of its 95 % bootstrap interval over problems.",
    "avg_high": "avg@k: upper end.",
    "cons": "cons@k: problems whose most frequent answer is right.",
    "cons_low": "cons@k: lower end of its interval.",
    "cons_high": "cons@k: upper end.",
    "pass": "pass@k: problems with at least one right answer.",
    "pass_low": "pass@k: lower end of its interval.",
    "pass_high": "pass@k: upper end.",
    "response_tokens": "Mean length of a response.",
    "truncated_fraction": "Responses that were cut off at the length limit.",
}

_EVALUATION = [
    Metric("evaluation/accuracy", "avg@k over the problems of all data sets.", "", EVALUATED),
    Metric("evaluation/response_tokens", "Mean length of a response, over all.", "tokens", EVALUATED),
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
    "sync": ("Giving the engine the actor's weights, and the memory where they share it.", SAMPLED),
    "evaluate": ("Evaluation.", EVALUATED),
    "generate": ("Sampling of responses; what overlaps with learning is not waited for, and not counted.", SAMPLED),
    "reward": ("In which at least one answer was being checked; within generate, not beside it.", SAMPLED),
    "log_probs": ("log π_old, and the reference policy's.", "algorithm.kind other than sft"),
    "update": ("Forward, backward and optimizer.", ""),
    "save": ("What the run waits for a checkpoint.", SAVED),
    "idle": ("What is left of the step: waiting for other ranks, delivery of tokens, and bookkeeping.", ""),
    "observe": ("Writing of all of this.", ""),
    "step": ("The whole step.", ""),
}

_TIME = [
    *(Metric(f"time/{name}", text, "s", when) for name, (text, when) in PARTS.items()),
    Metric("throughput/generated_tokens_per_second", "Response tokens sampled over time/generate.", "1/s", SAMPLED),
    Metric("throughput/trained_tokens_per_second", "Tokens, prompts included, over log_probs and update.", "1/s"),
    Metric("throughput/tokens_per_second", "Tokens learned from, prompts included, over time/step.", "1/s"),
    Metric("throughput/mfu", "Model FLOPs of log_probs and update over the GPUs' bf16 peak.", "", PEAK),
]

METRICS: tuple[Metric, ...] = (
    *_rollout(),
    *(Metric(f"sampler/{name}", text, "", SAMPLED) for name, text in SAMPLER_COUNTS.items()),
    *OF_UPDATES.values(),
    *_NOISE,
    *_HEALTH,
    *_EVALUATION,
    *_TIME,
)
"""All scalars, in the order in which they are documented."""

HISTOGRAMS = (
    Metric("rollout/response_tokens", "Lengths of the responses that are learned from.", "tokens", SAMPLED),
    Metric("policy/log_ratio_positive", "d of the tokens with A > 0.", "nats", "tokens with A > 0"),
    Metric("policy/log_ratio_negative", "d of the tokens with A ≤ 0.", "nats", "tokens with A ≤ 0"),
)
"""In TensorBoard alone."""

TEXTS = (Metric("samples/responses", "Some responses of the step, right and wrong ones.", "", SAMPLED),)
"""In TensorBoard alone."""
