"""What an update did, as numbers that are the same on every rank, and per token for those who want to look."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import LocalMicroBatch
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.algorithm.policy_loss import LossOutput
from fipo_megatron.data.packing import MicroBatch

Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class TokenPart:
    """What one rank knows of the response tokens of a trajectory.

    Attributes:
        positions: Places in the response, ``[n]`` int64; those in the loss that this rank holds.
        values: ``[n]`` float32 each: ``old_log_prob``, ``shift`` (d), ``future_kl`` (F), ``weight`` (f), and
            ``entropy`` of π_old where it is known.
    """

    positions: NDArray[np.int64]
    values: Values


@dataclass(frozen=True, eq=False)
class UpdateMetrics:
    """What one optimizer step did; the same on every rank, but for ``tokens``.

    Attributes:
        loss: Numerator over denominator of the global mini-batch; NaN where the denominator is 0.
        denominator: Tokens (or sequences) in the loss, over all ranks.
        grad_norm: Global gradient norm before clipping; NaN where the step was skipped.
        learning_rate: Of this step; NaN where it was skipped.
        skipped: Why no step was taken: ``non-finite loss``, ``non-finite gradient`` or ``empty loss``; empty where one
            was.
        statistics: See :mod:`.algorithm.loss_statistics`; merged over all ranks. The entropy is that of π_old unless
            the loss has an entropy term.
        shifts: ``[2, NUM_BINS]`` int64: histograms of d by sign of the advantage (:mod:`.algorithm.loss_statistics`).
        tokens: By index, what this rank knows of the trajectories that were watched.
    """

    loss: float
    denominator: int
    grad_norm: float
    learning_rate: float
    skipped: str
    statistics: dict[str, float]
    shifts: NDArray[np.int64]
    tokens: Mapping[int, TokenPart] = field(default_factory=dict)


@dataclass(frozen=True)
class NoiseFloor:
    """How far two passes at equal weights disagree: what FIPO would take for drift.

    Attributes:
        shift: Largest |d|.
        future_kl: Largest |F|; 0 for the baselines, which have none.
    """

    shift: float
    future_kl: float


class NoiseError(RuntimeError):
    """The noise floor is beyond its bounds.

    Attributes:
        floor: What was measured.
    """

    def __init__(self, message: str, floor: NoiseFloor) -> None:
        super().__init__(message)
        self.floor = floor


@dataclass(frozen=True, eq=False)
class Reduced:
    """A mini-batch over all ranks.

    Attributes:
        numerator: Of the loss.
        denominator: Of the loss.
        statistics: See :class:`UpdateMetrics`.
        shifts: See :class:`UpdateMetrics`.
    """

    numerator: float
    denominator: float
    statistics: dict[str, float]
    shifts: NDArray[np.int64]


def reduce_outputs(outputs: Sequence[LossOutput], layout: RankLayout) -> Reduced:
    """Merges over micro-batches, then over data- and context-parallel ranks of the last stage, then tells all."""
    message: list[Reduced | None] = [None]
    if outputs:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        statistics = outputs[0].statistics
        for output in outputs[1:]:
            statistics = statistics + output.statistics
        totals = torch.stack(
            [
                torch.stack([output.numerator.detach() for output in outputs]).double().sum(),
                torch.stack([output.denominator for output in outputs]).sum().double(),
            ]
        )
        dist.all_reduce(totals, group=group)
        statistics = statistics.all_reduce(group)
        message = [Reduced(*totals.tolist(), statistics.metrics(), statistics.histograms.cpu().numpy())]
    if layout.pipeline_size > 1:
        dist.broadcast_object_list(
            message,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
            device=layout.device,
        )
    assert message[0] is not None
    return message[0]


def token_parts(
    wanted: Collection[int],
    members: MicroBatch,
    prompt_lengths: Sequence[int],
    micro: LocalMicroBatch,
    old: TokenLogProbs,
    found: TokenLogProbs,
    output: LossOutput,
) -> dict[int, TokenPart]:
    """Per token, what a pass over a micro-batch found of the trajectories that are wanted; one copy to the host.

    Args:
        wanted: Indices of trajectories.
        members: Those of the micro-batch, in its order.
        prompt_lengths: Tokens of the prompt of each member.
        micro: This rank's part of it.
        old: Log-probs of π_old.
        found: Of π_θ.
        output: Of the loss.
    """
    if not set(wanted) & set(members):
        return {}
    given = {
        "old_log_prob": old.log_probs,
        "shift": found.log_probs.detach() - old.log_probs,
        "future_kl": output.future_kl,
        "weight": output.weight,
        "entropy": old.entropy,
    }
    values = {name: value.float().cpu().numpy() for name, value in given.items() if value is not None}
    mask, positions = micro.mask.cpu().numpy(), micro.position_ids[0].cpu().numpy()
    lengths = micro.shards.chunk_lengths.cpu().numpy() * micro.shards.num_slots
    ends = np.cumsum(lengths)
    parts = {}
    for index, prompt, start, end in zip(members, prompt_lengths, ends - lengths, ends, strict=True):
        if index in wanted:
            here = np.arange(start, end)[mask[start:end]]
            # The log-prob of token p + 1 stands at position p.
            parts[index] = TokenPart(positions[here] - (prompt - 1), {name: v[here] for name, v in values.items()})
    return parts
