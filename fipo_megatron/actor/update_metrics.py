"""Metrics of an update, reduced over all ranks, and per-token values of the trajectories that are watched."""

from __future__ import annotations

import math
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
from fipo_megatron.config import Config
from fipo_megatron.data.packing import MicroBatch

Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class TokenPart:
    """Per-token values of a trajectory's response on one rank.

    Attributes:
        positions: Positions in the response, ``[n]`` int64; those in the loss that this rank holds.
        values: Values by name, ``[n]`` float32 each: ``old_log_prob``, ``shift`` (d), ``future_kl`` (F), ``weight``
            (f), and ``entropy`` of π_old if it is known.
    """

    positions: NDArray[np.int64]
    values: Values


@dataclass(frozen=True, eq=False)
class UpdateMetrics:
    """Metrics of a mini-batch and its optimizer step, the same on every rank except ``tokens``.

    Attributes:
        loss: Numerator over denominator of the global mini-batch; NaN if the denominator is 0.
        denominator: Number of tokens (or sequences) in the loss, over all ranks.
        grad_norm: Global gradient norm before clipping; NaN if no step was taken.
        learning_rate: Learning rate of the step; NaN if no step was taken.
        skipped: Reason why the step was skipped: ``non-finite loss``, ``non-finite gradient`` or ``empty loss``; else
            empty.
        statistics: Statistics over all ranks (:mod:`.algorithm.loss_statistics`). The entropy is that of π_old unless
            the loss has an entropy term.
        shifts: Histograms of d by sign of the advantage, ``[2, NUM_BINS]`` int64 (:mod:`.algorithm.loss_statistics`).
        tokens: Per-token values of the watched trajectories on this rank, by index.
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
    """The disagreement of two passes at equal weights, which FIPO would take for drift.

    Attributes:
        shift: Largest |d|.
        future_kl: Largest |F|; 0 for the baselines, which do not weight tokens by it.
    """

    shift: float
    future_kl: float


class UpdatesSkippedError(RuntimeError):
    """Supervised fine-tuning changes nothing any more: too many updates in a row were skipped."""


class NoiseError(RuntimeError):
    """Raised if the noise floor exceeds its bounds.

    Attributes:
        floor: The measured noise floor.
    """

    def __init__(self, message: str, floor: NoiseFloor) -> None:
        super().__init__(message)
        self.floor = floor


def reduce_outputs(outputs: Sequence[LossOutput], layout: RankLayout) -> UpdateMetrics:
    """Reduces the loss over micro-batches and all ranks. A collective.

    The last stage reduces over its data- and context-parallel ranks and broadcasts the result along the pipeline.

    Args:
        outputs: Losses of this rank's micro-batches; empty on stages before the last.
        layout: Layout of this rank.

    Returns:
        Metrics without those of an optimizer step: gradient norm and learning rate are NaN.
    """
    message: list[UpdateMetrics | None] = [None]
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
        numerator, denominator = totals.tolist()
        message = [
            UpdateMetrics(
                loss=numerator / denominator if denominator else math.nan,
                denominator=int(denominator),
                grad_norm=math.nan,
                learning_rate=math.nan,
                skipped="",
                statistics=statistics.metrics(),
                shifts=statistics.histograms.cpu().numpy(),
            )
        ]
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
    """Extracts the per-token values of the wanted trajectories from a pass over a micro-batch, on the host.

    Args:
        wanted: Indices of the wanted trajectories.
        members: Indices of the trajectories of the micro-batch, in its order.
        prompt_lengths: Number of prompt tokens of each member.
        micro: This rank's part of the micro-batch.
        old: Log-probs under π_old.
        found: Log-probs under π_θ.
        output: Output of the loss.

    Returns:
        Values of the response tokens in the loss that this rank holds, by trajectory.
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


def check_skipped(config: Config, in_a_row: int, reason: str) -> None:
    """Ends supervised fine-tuning that changes nothing any more; the collapse alarm watches the other algorithms.

    Args:
        config: Configuration of the run.
        in_a_row: Number of updates that were skipped since the last that was not.
        reason: Reason why the last one was skipped.

    Raises:
        UpdatesSkippedError: ``algorithm.kind`` is ``sft``, and ``sft.max_skipped_updates`` is reached.
    """
    most = config.sft.max_skipped_updates
    if config.algorithm.kind == "sft" and in_a_row >= most:
        raise UpdatesSkippedError(
            f"{in_a_row} updates in a row were skipped (sft.max_skipped_updates = {most}), the last one because of a "
            f"{reason}; a lower learning rate or another dtype may help"
        )
