"""Advantages of whole responses: group-relative baselines, dynamic sampling, length shaping.

Every tensor holds one value per response (``[N]``), on the host or on a device. An explicit id names the group of each
response, so the order of the responses does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fipo_megatron.algorithm.policy_loss_config import Baseline

_ROUNDING = 1e-12


def group_advantages(
    rewards: Tensor, group_ids: Tensor, baseline: Baseline = "group_normalised", epsilon: float = 1e-6
) -> Tensor:
    """Returns the advantage of each response relative to the responses to the same prompt.

    ``group_normalised``: ``(R − mean) / (std + ε)`` with the n−1 standard deviation (GRPO), 0 if the rewards are equal.
    ``group_mean``: ``R − mean``. ``leave_one_out``: ``R`` minus the mean of the *other* responses (RLOO).

    Args:
        rewards: Reward of each response, ``[N]`` floating point; the advantage is computed in float64.
        group_ids: Group of each response, ``[N]`` integer; responses with the same id form a group.
        baseline: Baseline that is subtracted from the reward.
        epsilon: Constant added to the standard deviation.

    Returns:
        Advantages, ``[N]`` float32.

    Raises:
        ValueError: Shapes or dtypes do not fit, a reward is not finite, the baseline is unknown, or a group has one
            response, which is too few for a baseline.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape or group_ids.is_floating_point():
        raise ValueError(
            "rewards, group_ids: expected [N] and integer [N], got "
            f"{list(rewards.shape)} and {group_ids.dtype} {list(group_ids.shape)}"
        )
    rewards = rewards.double()
    if not rewards.isfinite().all():
        bad = int(rewards.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"rewards: response {bad} (group {int(group_ids[bad])}) is {float(rewards[bad])}")
    groups, index, sizes = _groups(group_ids)
    if (sizes < 2).any():
        raise ValueError(f"group_ids: groups {groups[sizes < 2].tolist()} have one response; a baseline needs two")
    zeros = torch.zeros(len(groups), dtype=torch.float64, device=rewards.device)
    mean = zeros.index_add(0, index, rewards) / sizes
    centred = rewards - mean[index]
    if baseline == "group_mean":
        advantages = centred
    elif baseline == "leave_one_out":
        advantages = centred * (sizes / (sizes - 1))[index]
    elif baseline == "group_normalised":
        std = (zeros.index_add(0, index, centred.square()) / (sizes - 1)).sqrt()
        scale = std[index] + epsilon
        # With ε = 0, equal rewards have a deviation of 0 or of rounding: their advantages stay 0.
        advantages = centred / torch.where(scale > _ROUNDING, scale, 1.0)
    else:
        raise ValueError(f"baseline: expected group_normalised, group_mean or leave_one_out, got {baseline!r}")
    return advantages.float()


def is_informative(accuracies: Sequence[int]) -> bool:
    """Returns whether dynamic sampling (DAPO) keeps a group: its responses are neither all right nor all wrong.

    Args:
        accuracies: Verdict of the verifier for each response of the group, 0 or 1, before any shaping of the reward.

    Raises:
        ValueError: an accuracy is neither 0 nor 1.
    """
    for accuracy in accuracies:
        if accuracy not in (0, 1):
            raise ValueError(f"accuracy: expected 0 or 1, got {accuracy}")
    return 0 < sum(accuracies) < len(accuracies)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Returns the soft length penalty (DAPO): 0 up to ``max_length − buffer`` tokens, then linear down to ``−factor``.

    The penalty ``min(0, −(n − (max_length − buffer)) / buffer · factor)`` is added to the reward.

    Args:
        lengths: n, tokens of each response, ``[N]`` integer.
        max_length: Length limit of a response in tokens.
        buffer: Tokens over which the penalty grows; 0 turns it off.
        factor: Magnitude of the penalty at ``max_length``.

    Returns:
        Penalties, ``[N]`` float32, ≤ 0.

    Raises:
        ValueError: The buffer is negative or longer than ``max_length``.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer: must be between 0 and max_length = {max_length} tokens, got {buffer}")
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return (-(lengths - (max_length - buffer)).double() / buffer * factor).clamp(max=0.0).float()


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the distinct ids ``[G]``, the index of each response's id among them ``[N]``, and the sizes ``[G]``."""
    groups, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)  # untyped in torch
    return groups, index, sizes
