"""A reference implementation of the losses: loops over one response at a time in float64, gradients by hand.

It is written from the formulas alone (arXiv 2603.19835, Eq. 5-8, Table 2; DAPO; GRPO) and shares nothing with the
package but the names of the configuration's fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Response:
    """The float64 arrays ``[R]`` and the bool mask of one response."""

    new: np.ndarray
    old: np.ndarray
    advantage: np.ndarray
    mask: np.ndarray
    reference: np.ndarray | None = None
    behaviour: np.ndarray | None = None


def suffix_sum(x, half_life):
    gamma = 2.0 ** (-1.0 / half_life)
    result, following = np.zeros(len(x)), 0.0
    for t in range(len(x) - 1, -1, -1):
        following = x[t] + gamma * following
        result[t] = following
    return result


def response_loss(r, c):
    """Returns token losses, their gradients w.r.t. ``new``, the number of dual-clipped tokens, and values per token."""
    n, values = len(r.new), []
    shift = [max(-c.shift_clamp, min(c.shift_clamp, r.new[t] - r.old[t])) if r.mask[t] else 0.0 for t in range(n)]
    passed = [d if not c.future_kl_filter or d <= math.log(c.dual_clip) else 0.0 for d in shift]
    future = suffix_sum(passed, c.half_life)
    loss, gradient, dual_clipped = np.zeros(n), np.zeros(n), 0
    for t in range(n):
        if not r.mask[t]:
            continue
        ratio, advantage = math.exp(shift[t]), r.advantage[t]
        weight = 1.0
        if c.kind == "fipo":
            raw = math.exp(future[t])
            weight = (
                min(raw, c.weight_max) if c.weight_clip is None else min(max(raw, c.weight_clip[0]), c.weight_clip[1])
            )
            if advantage < 0 and ratio > c.safety_threshold:
                weight = min(max(weight, 0.8), 1.0) if c.safety_rule == "release" else 1.0
        unsafe = c.kind == "fipo" and advantage < 0 and ratio > c.safety_threshold
        inside = abs(r.new[t] - r.old[t]) <= c.shift_clamp
        plain = ratio * weight * advantage
        clipped = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high) * weight * advantage
        values.append((shift[t], future[t], weight, advantage, ratio > c.dual_clip, unsafe, clipped < plain))
        loss[t] = -min(plain, clipped)
        gradient[t] = -plain * inside if plain <= clipped else 0.0
        if advantage < 0 and ratio > c.dual_clip:
            dual_clipped += 1
            loss[t], gradient[t] = -c.dual_clip * weight * advantage, 0.0
        if c.importance_cap is not None:
            correction = min(math.exp(r.old[t] - r.behaviour[t]), c.importance_cap)
            loss[t], gradient[t] = loss[t] * correction, gradient[t] * correction
        if c.kl_coef:
            gap = r.new[t] - r.reference[t]
            kl, slope = {
                "k1": (gap, 1.0),
                "k2": (gap * gap / 2, gap),
                "k3": (math.exp(-gap) - 1 + gap, 1 - math.exp(-gap)),
            }[c.kl_estimator]
            loss[t] += c.kl_coef * kl
            gradient[t] += c.kl_coef * slope
    return loss, gradient, dual_clipped, values


def mini_batch(responses, c):
    """Returns the loss of the mini-batch, its gradients per response, denominator and number of dropped responses."""
    numerator, denominator, dropped, gradients = 0.0, 0, 0, []
    for r in responses:
        loss, gradient, dual_clipped, _ = response_loss(r, c)
        drop = c.sequence_drop and dual_clipped > c.sequence_drop_threshold
        dropped += drop
        tokens = int(r.mask.sum())
        if drop or tokens == 0:
            gradients.append(np.zeros(len(r.new)))
        elif c.aggregation == "token_mean":
            numerator, denominator = numerator + loss.sum(), denominator + tokens
            gradients.append(gradient)
        else:
            numerator, denominator = numerator + loss.sum() / tokens, denominator + 1
            gradients.append(gradient / tokens)
    return numerator / denominator, [g / denominator for g in gradients], denominator, dropped
