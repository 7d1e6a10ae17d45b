"""The lr = 0 gate: the disagreement of the log-prob pass and the training pass at equal weights.

Both are real passes: forward and backward through the training schedule in one, forward only in the other. FIPO would
take their disagreement for drift of the policy.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from fipo_megatron.actor.fp8 import frozen_scaling
from fipo_megatron.actor.update_metrics import NoiseError, NoiseFloor
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig
from fipo_megatron.data.packing import MiniBatch

if TYPE_CHECKING:
    from fipo_megatron.actor.actor import MegatronActor, StoredLogProbs, Trajectories

logger = logging.getLogger(__name__)


def measure(
    actor: MegatronActor, mini_batch: MiniBatch, trajectories: Trajectories, old: StoredLogProbs
) -> NoiseFloor | None:
    """Runs the training pass of a mini-batch and compares it with the log-prob pass. A collective.

    Weights and FP8 scales stay as they are. Gradients are discarded.

    Args:
        actor: Actor of this rank.
        mini_batch: First mini-batch of a plan.
        trajectories: Trajectories passed to :meth:`.actor.MegatronActor.log_probs`.
        old: Result of :meth:`.actor.MegatronActor.log_probs` for ``[mini_batch]``.

    Returns:
        The noise floor; None if no token of the mini-batch is in the loss.
    """
    with frozen_scaling(actor.chunks):
        statistics = actor.forward_backward(
            mini_batch, trajectories, old[0], algorithm=_drift_only(actor.config.algorithm)
        ).statistics
    actor.zero_grad()
    if not statistics["tokens"]:
        return None
    future_kl = statistics["future_kl_abs_max"] if actor.config.algorithm.kind == "fipo" else 0.0
    return NoiseFloor(statistics["shift_abs_max"], future_kl)


def check(
    actor: MegatronActor, mini_batch: MiniBatch, trajectories: Trajectories, *, warm_up: bool = True
) -> NoiseFloor | None:
    """Checks the noise floor against ``actor.max_noise_shift`` and ``actor.max_noise_future_kl``. A collective.

    Args:
        actor: Actor of this rank.
        mini_batch: First mini-batch of a plan.
        trajectories: Trajectories passed to :meth:`.actor.MegatronActor.log_probs`.
        warm_up: Under delayed FP8 scaling, run a training pass first: scales are not loaded from checkpoints.

    Returns:
        The noise floor; None if no token of the mini-batch is in the loss.

    Raises:
        NoiseError: the noise floor exceeds a bound; FIPO would weight tokens by noise.
    """
    config = actor.config.actor
    if config.fp8 != "off" and config.fp8_recipe == "delayed" and warm_up:
        # Every delayed scale is 1 until a first training pass has recorded the maxima of the tensors.
        old = actor.log_probs([mini_batch], trajectories)
        actor.forward_backward(mini_batch, trajectories, old[0], algorithm=_drift_only(actor.config.algorithm))
        actor.zero_grad()
    floor = measure(actor, mini_batch, trajectories, actor.log_probs([mini_batch], trajectories))
    if floor is None:
        return None
    for field, value in (("max_noise_shift", floor.shift), ("max_noise_future_kl", floor.future_kl)):
        bound = getattr(config, field)
        if not value <= bound:
            raise NoiseError(
                f"actor.{field} = {bound:g}: the log-prob pass and the training pass differ by {value:g} at equal "
                "weights; look for kernels that are not deterministic, FP8 scaling, or different packing"
                + _nvls(actor),
                floor,
            )
    logger.info("noise floor at equal weights: |d| <= %.3g, |F| <= %.3g", floor.shift, floor.future_kl)
    return floor


def _nvls(actor: MegatronActor) -> str:
    """Returns a hint at NCCL's all-reduce in NVLink switches, which adds in an order of its own."""
    if actor.layout.tensor_size == 1 or actor.layout.device.type != "cuda":
        return ""
    return "; with tensor parallelism also at NCCL's all-reduce in NVLink switches, which NCCL_NVLS_ENABLE=0 turns off"


def _drift_only(algorithm: PolicyLossConfig) -> PolicyLossConfig:
    """Returns the loss without the terms that d and F do not need, whose inputs may be missing."""
    return replace(algorithm, kl_coef=0.0, entropy_coef=0.0, importance_cap=None)
