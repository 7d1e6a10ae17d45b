"""The token losses FIPO, DAPO and GRPO, as pure functions of a dataclass of tensors.

A loss is a numerator and an integer denominator. The actor hands both to Megatron, which divides by the denominator of
the global mini-batch (``calculate_per_token_loss``). Both are plain sums over the tokens of this rank, so any split of
a mini-batch over micro-batches, data-parallel and context-parallel ranks adds up to the same loss; a micro-batch holds
whole sequences. Sources: arXiv 2603.19835 (equations below) and the behaviour of its authors' release; each difference
between the two is a field of :class:`.PolicyLossConfig`.

Logical shapes, as suffixes of names: T tokens on this rank (packed), S sequences of the micro-batch, R ranks of the
context-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fipo_megatron.algorithm.future_kl import (
    Exchange,
    SequenceShards,
    add_carries,
    chunk_carries,
    exchange_over_ranks,
    scan_chunks,
)
from fipo_megatron.algorithm.loss_statistics import LossStatistics, shift_histogram
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig

LARGEST_EXPONENT = 80.0
"""Largest argument of exp. It keeps exp and its gradient finite in float32 and is far above any clip."""

RELEASE_SAFETY_RANGE = (0.8, 1.0)
"""Range to which the release clamps the weight of a negative-advantage token above the safety threshold."""


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: gap,
    "k2": lambda gap: gap.square() / 2,
    "k3": lambda gap: torch.expm1(-gap) + gap,
}
"""Per-token estimates of KL(π_θ ‖ π_ref) from the gap log π_θ − log π_ref of a token sampled from π_θ."""


@dataclass(frozen=True)
class LossInputs:
    """Per-token tensors of one packed micro-batch on this rank, all at the predicting position.

    Attributes:
        log_probs: log π_θ of the labels, ``[T]`` floating point. Gradients flow to this tensor and to ``entropy`` only.
        old_log_probs: log π_old, ``[T]``: under the trainer's weights before the first update on this batch.
        advantages: Advantage of each token's response, ``[T]``.
        mask: Tokens of the loss, ``[T]`` bool: response tokens, neither prompt nor padding.
        shards: Layout of the tokens.
        reference_log_probs: log π_ref, ``[T]``; required if ``kl_coef`` > 0.
        behaviour_log_probs: log π_behaviour, the engine's log-probs, ``[T]``; required if ``importance_cap`` is set,
            otherwise optional, for statistics.
        entropy: Entropy of the policy, ``[T]``; required if ``entropy_coef`` ≠ 0, otherwise optional, for statistics.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    shards: SequenceShards
    reference_log_probs: Tensor | None = None
    behaviour_log_probs: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks shapes, dtypes and devices without a device sync.

        Raises:
            ValueError: A tensor does not fit; the message names the field.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            if value.shape != (self.shards.num_tokens,):
                expected = f"[{self.shards.num_tokens}] (the tokens of the layout)"
                raise ValueError(f"{field.name}: expected shape {expected}, got {list(value.shape)}")
            if (value.dtype == torch.bool) != (field.name == "mask") or not (
                value.is_floating_point() or field.name == "mask"
            ):
                kind = "bool" if field.name == "mask" else "a floating point dtype"
                raise ValueError(f"{field.name}: expected {kind}, got {value.dtype}")
            if value.device != self.log_probs.device:
                raise ValueError(f"{field.name}: is on {value.device}, log_probs on {self.log_probs.device}")

    def to(self, dtype: torch.dtype) -> LossInputs:
        """Returns a copy with every floating-point tensor in ``dtype``."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        floating = {k: v.to(dtype) for k, v in tensors.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return LossInputs(**(tensors | floating))


@dataclass(frozen=True)
class LossOutput:
    """The loss of one rank's part of a micro-batch, as a fraction, with its statistics.

    Attributes:
        numerator: Sum over the rank's part, scalar, float32 or float64, with gradient.
        denominator: Tokens kept in the loss on this rank or, for ``sequence_mean``, sequences counted on this rank;
            scalar int64.
        statistics: Mergeable statistics of the rank's part.
        future_kl: F, ``[T]``, without gradient; 0 for ``sft``.
        weight: f as used in the loss, ``[T]``, without gradient; 1 for the baselines.
    """

    numerator: Tensor
    denominator: Tensor
    statistics: LossStatistics
    future_kl: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Weighting:
    """The inputs of the loss that have no gradient. ``_S`` fields describe whole sequences, over all ranks.

    ``fipo_weight_T`` is the weight that FIPO gives to a token, ``weight_T`` the one that the loss uses.
    """

    future_kl_T: Tensor
    mismatch_future_kl_T: Tensor | None
    raw_weight_T: Tensor
    fipo_weight_T: Tensor
    weight_T: Tensor
    unsafe_T: Tensor
    dual_clipped_T: Tensor
    tokens_S: Tensor
    dropped_S: Tensor


def policy_loss(inputs: LossInputs, config: PolicyLossConfig, exchange: Exchange | None = None) -> LossOutput:
    """Computes the loss of one packed micro-batch on one rank (Eq. 8 with the fields of ``config``).

    Args:
        inputs: Per-token tensors of the micro-batch.
        config: Configuration of the loss.
        exchange: All-gather over the context-parallel group (:func:`.future_kl.gather_over`), called exactly once in
            the forward pass if sequences are spread over several ranks, and never in backward.

    Returns:
        Numerator, denominator and statistics. A non-finite log-prob of a token in the mask makes the numerator NaN.

    Raises:
        ValueError: ``inputs`` lacks a tensor that ``config`` requires, or a required exchange is missing.
    """
    _check_present(inputs, config)
    dtype = torch.promote_types(inputs.log_probs.dtype, torch.float32)
    inputs = inputs.to(dtype)
    shift_T = log_prob_shift(inputs.log_probs, inputs.old_log_probs, inputs.mask, config.shift_clamp)
    with torch.no_grad():
        weighting = _weigh(shift_T.detach(), inputs, config, exchange)

    if config.kind == "sft":
        loss_T, clipped_T = 0.0 * shift_T.detach() - inputs.log_probs, None
    else:
        loss_T, clipped_T = surrogate(shift_T.exp(), weighting.weight_T * inputs.advantages, config)
    importance_T = reference_kl_T = None
    if config.importance_cap is not None and inputs.behaviour_log_probs is not None:
        importance_T = truncated_importance_weights(
            inputs.old_log_probs, inputs.behaviour_log_probs, inputs.mask, config.importance_cap
        )
        loss_T = loss_T * importance_T
    if config.kl_coef and inputs.reference_log_probs is not None:
        gap_T = log_prob_shift(inputs.log_probs, inputs.reference_log_probs, inputs.mask, math.inf)
        reference_kl_T = KL_ESTIMATORS[config.kl_estimator](gap_T)
        loss_T = loss_T + config.kl_coef * reference_kl_T
    if config.entropy_coef and inputs.entropy is not None:
        loss_T = loss_T - config.entropy_coef * inputs.entropy

    numerator, denominator = _aggregate(loss_T, weighting, inputs, config)
    with torch.no_grad():
        means = {"importance_weight_mean": importance_T, "reference_kl": reference_kl_T}
        if clipped_T is not None:
            low_T = clipped_T & (inputs.advantages < 0)
            means |= {
                "clip_fraction": clipped_T,
                "clip_fraction_low": low_T,
                "clip_fraction_high": clipped_T & ~low_T,
            }
        statistics = _statistics(means, shift_T.detach(), weighting, inputs, config)
    return LossOutput(numerator, denominator, statistics, weighting.future_kl_T, weighting.weight_T)


def log_prob_shift(log_probs_T: Tensor, old_log_probs_T: Tensor, mask_T: Tensor, clamp: float) -> Tensor:
    """Returns ``d = log π_θ − log π_old`` clamped to ± ``clamp``, ``[T]``; 0 without gradient outside the mask.

    A non-finite difference inside the mask becomes NaN; a clamp alone would turn an infinity into a plausible number.
    """
    bound = min(clamp, LARGEST_EXPONENT)
    shift_T = torch.where(mask_T, log_probs_T - old_log_probs_T, 0.0)
    return shift_T.clamp(-bound, bound) + 0.0 * shift_T.detach()


def future_kl_weight(
    raw_weight_T: Tensor, ratio_T: Tensor, advantages_T: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Computes the weight f and the tokens that the safety rule applies to (Eq. 7 and the text below it).

    Args:
        raw_weight_T: exp(F), ``[T]``.
        ratio_T: r, ``[T]``.
        advantages_T: A, ``[T]``.
        config: Configuration of the loss. The baselines do not use the weight; it says what FIPO would do.

    Returns:
        Weight, ``[T]``, and the tokens under the safety rule, ``[T]`` bool.
    """
    weight_T = raw_weight_T.clamp(*config.weight_bounds)
    unsafe_T = (advantages_T < 0) & (ratio_T > config.safety_threshold)
    safe_T = weight_T.clamp(*RELEASE_SAFETY_RANGE) if config.safety_rule == "release" else torch.ones_like(weight_T)
    return torch.where(unsafe_T, safe_T, weight_T), unsafe_T


def surrogate(ratio_T: Tensor, advantages_T: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Returns ``−min(r A, clip(r, 1−ε_low, 1+ε_high) A)``, capped at ``−c A`` for A < 0 (Eq. 8, dual clip of Table 2).

    Args:
        ratio_T: r with gradient, ``[T]``.
        advantages_T: f A, ``[T]``.
        config: Configuration of the loss.

    Returns:
        Token losses, ``[T]``, and the tokens whose clipped branch is the larger, ``[T]`` bool.
    """
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss_T = torch.maximum(plain_T, clipped_T)
    if config.dual_clip < math.inf:
        loss_T = torch.where(advantages_T < 0, torch.minimum(loss_T, -config.dual_clip * advantages_T), loss_T)
    return loss_T, clipped_T > plain_T


def truncated_importance_weights(
    old_log_probs_T: Tensor, behaviour_log_probs_T: Tensor, mask_T: Tensor, cap: float
) -> Tensor:
    """Returns ``min(π_old / π_behaviour, cap)`` per token, ``[T]``, without gradient; 1 outside the mask."""
    gap_T = torch.where(mask_T, old_log_probs_T - behaviour_log_probs_T, 0.0).detach()
    return gap_T.exp().clamp(max=cap) + 0.0 * gap_T  # an infinite gap becomes NaN, not a plausible weight


def _check_present(inputs: LossInputs, config: PolicyLossConfig) -> None:
    needed = {
        "reference_log_probs": (config.kl_coef > 0, f"kl_coef = {config.kl_coef:g}"),
        "behaviour_log_probs": (config.importance_cap is not None, f"importance_cap = {config.importance_cap}"),
        "entropy": (config.entropy_coef != 0, f"entropy_coef = {config.entropy_coef:g}"),
    }
    for name, (needs, reason) in needed.items():
        if needs and getattr(inputs, name) is None:
            raise ValueError(f"{name}: missing, needed for {reason}")


def _weigh(shift_T: Tensor, inputs: LossInputs, config: PolicyLossConfig, exchange: Exchange | None) -> _Weighting:
    """Computes the Future-KL weights and the sequences to drop, with one exchange for both.

    The message holds, per sequence, this rank's counts of dual-clipped tokens and of tokens in the mask, and the heads
    of its chunks: those of the drift and, if the engine's log-probs are known, those of the mismatch. Under zigzag
    context parallelism that is four or six numbers. The baselines compute the same for their statistics; ``sft`` has no
    drift.
    """
    shards, ratio_T = inputs.shards, shift_T.exp()
    dual_clipped_T = inputs.mask & (inputs.advantages < 0) & (ratio_T > config.dual_clip)
    message = [shards.count_by_sequence(flags_T).double()[:, None] for flags_T in (dual_clipped_T, inputs.mask)]
    scans = [scan_chunks(values_T, shards, config.half_life) for values_T in _scanned(shift_T, inputs, config)]
    gathered = exchange_over_ranks(torch.cat(message + [heads_SK for _, heads_SK in scans], dim=1), shards, exchange)
    dual_clipped_S, tokens_S = gathered[:, :, :2].sum(0).unbind(1)
    suffix_sums = []
    for number, (sums_T, _) in enumerate(scans):
        if len(shards.owners) > 1:
            first = 2 + number * shards.num_slots
            carries_SK = chunk_carries(gathered[:, :, first : first + shards.num_slots], shards, config.half_life)
            sums_T = add_carries(sums_T, carries_SK, shards, config.half_life)
        suffix_sums.append(sums_T.to(shift_T.dtype))
    future_kl_T = suffix_sums[0] if suffix_sums else torch.zeros_like(shift_T)

    raw_weight_T = future_kl_T.clamp(max=LARGEST_EXPONENT).exp()
    fipo_weight_T, unsafe_T = future_kl_weight(raw_weight_T, ratio_T, inputs.advantages, config)
    weight_T = fipo_weight_T if config.kind == "fipo" else torch.ones_like(fipo_weight_T)
    dropped_S = config.sequence_drop & (dual_clipped_S > config.sequence_drop_threshold)
    mismatch_T = suffix_sums[1] if len(suffix_sums) > 1 else None
    return _Weighting(
        future_kl_T,
        mismatch_T,
        raw_weight_T,
        fipo_weight_T,
        weight_T,
        unsafe_T,
        dual_clipped_T,
        tokens_S,
        dropped_S,
    )


def _scanned(shift_T: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> list[Tensor]:
    """Returns the values to scan, ``[T]`` each: the drift and, as if it were drift, the mismatch with the engine."""
    if config.kind == "sft":
        return []
    shifts = [shift_T]
    if inputs.behaviour_log_probs is not None:
        shifts.append(log_prob_shift(inputs.old_log_probs, inputs.behaviour_log_probs, inputs.mask, config.shift_clamp))
    if not config.future_kl_filter:
        return shifts
    # "Not above the bound" instead of "at most the bound": a NaN must stay in the sum.
    return [torch.where(values_T > math.log(config.dual_clip), 0.0, values_T) for values_T in shifts]


def _aggregate(
    loss_T: Tensor, weighting: _Weighting, inputs: LossInputs, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    shards = inputs.shards
    kept_T = inputs.mask & ~shards.spread(weighting.dropped_S)
    # 0 · NaN = NaN: a non-finite token reaches the numerator even if its response is dropped.
    loss_T = torch.where(kept_T, loss_T, torch.where(inputs.mask, 0.0 * loss_T.detach(), 0.0))
    if config.aggregation == "token_mean":
        return loss_T.sum(), kept_T.sum()
    # Every rank adds its part of every sequence to the numerator; a single rank counts the sequence.
    kept_S = (weighting.tokens_S > 0) & ~weighting.dropped_S
    return (loss_T / shards.spread(weighting.tokens_S.clamp(min=1)).to(loss_T.dtype)).sum(), shards.count_once(kept_S)


def _statistics(
    loss_means: dict[str, Tensor | None],
    shift_T: Tensor,
    weighting: _Weighting,
    inputs: LossInputs,
    config: PolicyLossConfig,
) -> LossStatistics:
    present_S = weighting.tokens_S > 0
    counts = {
        "tokens": inputs.mask.sum(),
        "sequences": inputs.shards.count_once(present_S),
        "dropped_sequences": inputs.shards.count_once(present_S & weighting.dropped_S),
    }
    means = {
        "policy_kl": -shift_T,
        "shift_abs_mean": shift_T.abs(),
        "dual_clip_fraction": weighting.dual_clipped_T,
        "advantage_mean": inputs.advantages,
        "entropy": inputs.entropy,
    } | loss_means
    extrema = {"shift_abs_max": shift_T.abs()}
    if config.kind != "sft":
        future_means, future_extrema = _future_kl_statistics(shift_T, weighting, inputs, config)
        means |= future_means
        extrema |= future_extrema
    if inputs.behaviour_log_probs is not None:
        gap_T = torch.where(inputs.mask, inputs.old_log_probs - inputs.behaviour_log_probs, 0.0)
        means |= {"mismatch_abs_mean": gap_T.abs(), "mismatch_kl": torch.expm1(gap_T) - gap_T}
        extrema |= {"mismatch_abs_max": gap_T.abs()}
        if weighting.mismatch_future_kl_T is not None:
            summed_T = weighting.mismatch_future_kl_T.abs()
            means |= {"mismatch_future_kl_abs_mean": summed_T}
            extrema |= {"mismatch_future_kl_abs_max": summed_T}
        if config.importance_cap is not None:
            means |= {"importance_truncated_fraction": gap_T > math.log(config.importance_cap)}
    present = {name: value for name, value in means.items() if value is not None}
    histogram = shift_histogram(shift_T, inputs.advantages > 0, inputs.mask)
    return LossStatistics.over_tokens(inputs.mask, counts, present, extrema, histogram)


def _future_kl_statistics(
    shift_T: Tensor, weighting: _Weighting, inputs: LossInputs, config: PolicyLossConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns means and extrema of F and of f; for the baselines of the f that FIPO would use, as ``shadow_weight``."""
    weight_T, raw_T, future_kl_T = weighting.fipo_weight_T, weighting.raw_weight_T, weighting.future_kl_T
    low, high = config.weight_bounds
    upper_T, lower_T = weight_T >= high, weight_T <= low
    name = "weight" if config.kind == "fipo" else "shadow_weight"
    means = {
        "future_kl_mean": future_kl_T,
        "future_kl_abs_mean": future_kl_T.abs(),
        "filtered_fraction": shift_T > math.log(config.dual_clip),
        f"{name}_mean": weight_T,
        "raw_weight_mean": raw_T,
        f"{name}_clip_fraction": upper_T | lower_T,
    }
    extrema = {
        f"{name}_max": weight_T,
        f"{name}_min": weight_T,
        "raw_weight_max": raw_T,
        "raw_weight_min": raw_T,
        "future_kl_abs_max": future_kl_T.abs(),
    }
    if config.kind == "fipo":
        means |= {
            "weight_clip_fraction_upper": upper_T,
            "weight_clip_fraction_lower": lower_T,
            "safety_fraction": weighting.unsafe_T,
        }
        for sign, of_sign_T in (("positive", inputs.advantages > 0), ("negative", inputs.advantages <= 0)):
            means |= {
                f"weight_clip_{sign}_upper": of_sign_T & upper_T,
                f"weight_clip_{sign}_lower": of_sign_T & lower_T,
            }
    return means, extrema
