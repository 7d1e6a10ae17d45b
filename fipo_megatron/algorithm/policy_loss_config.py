"""The configuration of the policy loss: every field with its source and range, and the defaults of each kind.

Equations and tables are those of arXiv 2603.19835; "release" is the published code of its authors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["fipo", "dapo", "grpo", "sft"]
SafetyRule = Literal["release", "paper"]
Aggregation = Literal["token_mean", "sequence_mean"]
KlEstimator = Literal["k1", "k2", "k3"]
Baseline = Literal["group_normalised", "group_mean", "leave_one_out"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "safety_rule": get_args(SafetyRule),
    "aggregation": get_args(Aggregation),
    "kl_estimator": get_args(KlEstimator),
}


_LARGEST = 1e9
"""Bound of finite values: products of two and an advantage stay far within float32."""


def _is_bounded(value: float) -> bool:
    return 0 < value <= _LARGEST or value == math.inf


@dataclass(frozen=True)
class PolicyLossConfig:
    """The configuration of the loss. Defaults are the paper's 32B recipe (Table 2) with the release's behaviour.

    Attributes:
        kind: Loss to minimise: ``fipo``; ``dapo`` or ``grpo``, the baselines without a Future-KL weight; or ``sft``,
            supervised fine-tuning: the mean of −log π_θ, without advantages.
        half_life: Half-life τ of the Future-KL discount in tokens (Eq. 6); inf for no decay (Eq. 5).
        future_kl_filter: Whether the sum leaves out tokens with a ratio above ``dual_clip`` (Eq. 5). They keep their
            position.
        weight_clip: Bounds of the weight f = clip(exp F, low, high) (Eq. 7); null: f = min(exp F, ``weight_max``).
        weight_max: Upper bound of the weight if ``weight_clip`` is null.
        safety_threshold: Ratio s above which ``safety_rule`` bounds the weight of a negative-advantage token; inf for
            never.
        safety_rule: Rule for the weight of such a token: ``release`` clamps it to [0.8, 1.0]; ``paper`` resets it to 1.
        clip_low: Lower clip range ε_low of the surrogate (Eq. 8).
        clip_high: Upper clip range ε_high of the surrogate (Eq. 8).
        dual_clip: Dual-clip bound c: for A < 0 the loss is capped at −c f A (Table 2; absent from Eq. 8); inf for no
            cap.
        sequence_drop: Whether a response with more than ``sequence_drop_threshold`` dual-clipped tokens is left out of
            the loss, numerator and denominator (release only; the paper has no such rule).
        sequence_drop_threshold: Largest number of dual-clipped tokens in a response that is kept.
        shift_clamp: Bound of the log-prob shift d, which is clamped to ± this value (release: 20); inf for no clamp
            (paper).
        aggregation: Mean over the mini-batch: ``token_mean`` over all tokens (DAPO, Eq. 8); ``sequence_mean`` over the
            tokens of each response, then over responses (GRPO).
        kl_coef: Coefficient β of a KL term to the reference policy; 0 for none.
        kl_estimator: Estimator of the KL term: k1 = Δ, k2 = Δ²/2, k3 = exp(−Δ) − 1 + Δ with Δ = log π_θ − log π_ref.
            As a loss term, k1 has zero expected gradient; k2 has the gradient of the reverse KL
            (http://joschu.net/blog/kl-approx.html).
        entropy_coef: Coefficient of the entropy bonus: this times the policy's entropy is subtracted from the loss; 0
            for none.
        importance_cap: Cap of truncated importance sampling: each token's loss is multiplied by
            min(π_old / π_behaviour, cap), without gradient; null for no correction.
    """

    kind: Kind = "fipo"
    half_life: float = 32.0
    future_kl_filter: bool = True
    weight_clip: tuple[float, float] | None = (1.0, 1.2)
    weight_max: float = 10.0
    safety_threshold: float = 10.0
    safety_rule: SafetyRule = "release"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    sequence_drop: bool = True
    sequence_drop_threshold: int = 1
    shift_clamp: float = 20.0
    aggregation: Aggregation = "token_mean"
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: Fields are invalid; the message has one line per field with its value and the valid ones.
        """
        low, high = self.weight_bounds
        limit = 1 + self.clip_high
        valid = {
            "half_life": (_is_bounded(self.half_life), f"> 0 tokens and at most {_LARGEST:g}, or inf for no decay"),
            "weight_clip": (
                0 <= low <= high <= _LARGEST,
                f"[low, high] with 0 <= low <= high <= {_LARGEST:g}, or null",
            ),
            "weight_max": (0 < self.weight_max <= _LARGEST, f"> 0 and at most {_LARGEST:g}"),
            "safety_threshold": (_is_bounded(self.safety_threshold), f"> 0 and at most {_LARGEST:g}, or inf for never"),
            "clip_low": (0 <= self.clip_low <= 1, "in [0, 1]"),
            "clip_high": (0 <= self.clip_high <= _LARGEST, f">= 0 and at most {_LARGEST:g}"),
            "dual_clip": (
                self.dual_clip > limit and _is_bounded(self.dual_clip),
                f"> 1 + clip_high = {limit:g} and at most {_LARGEST:g}, or inf for no cap",
            ),
            "sequence_drop_threshold": (0 <= self.sequence_drop_threshold < 2**31, ">= 0 tokens and below 2^31"),
            "shift_clamp": (_is_bounded(self.shift_clamp), f"> 0 and at most {_LARGEST:g}, or inf for none"),
            "kl_coef": (0 <= self.kl_coef <= _LARGEST, f">= 0 and at most {_LARGEST:g}"),
            "entropy_coef": (abs(self.entropy_coef) <= _LARGEST, f"of at most ± {_LARGEST:g}"),
            "importance_cap": (
                self.importance_cap is None or _is_bounded(self.importance_cap),
                f"> 0 and at most {_LARGEST:g}, or null",
            ),
        }
        for name, choices in _CHOICES.items():
            valid[name] = (getattr(self, name) in choices, f"one of {', '.join(choices)}")
        problems = [
            f"{name}: must be {expected}, got {getattr(self, name)}"
            for name, (fits, expected) in valid.items()
            if not fits
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def weight_bounds(self) -> tuple[float, float]:
        """Bounds of the weight f: ``weight_clip``, or [0, ``weight_max``]."""
        return (0.0, self.weight_max) if self.weight_clip is None else self.weight_clip


KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "fipo": {},
    "dapo": {},
    "sft": {"sequence_drop": False},
    "grpo": {
        "aggregation": "sequence_mean",
        "clip_high": 0.2,
        "dual_clip": math.inf,
        "sequence_drop": False,
        "kl_coef": 0.04,
    },
}
"""Defaults that each ``kind`` changes. GRPO: sequence mean, symmetric clip, k3 KL term with β = 0.04 (DeepSeekMath,
arXiv 2402.03300, Eq. 3 and 4, Sec. 4.2), no dual clip, no drop."""


def loss_config(kind: Kind, **changes: Any) -> PolicyLossConfig:
    """Returns the configuration of a ``kind`` with its defaults, and ``changes`` on top."""
    return PolicyLossConfig(kind=kind, **(KIND_DEFAULTS[kind] | changes))
