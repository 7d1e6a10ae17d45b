"""Two models in Megatron, held at the same time, that read the same packed responses.

Only final hidden states and output layers meet: the models may differ in everything but the vocabulary. There is no
optimizer and no gradient. The layout, dtype and packing are those of ``actor`` in the configuration, without FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from fipo_megatron.actor.finite_weights import check_finite
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.actor.micro_batches import LocalMicroBatch, local_micro_batches
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.recompute import recompute_off
from fipo_megatron.actor.router_losses import routers
from fipo_megatron.actor.sharded_checkpoint import load_weights
from fipo_megatron.compare.divergences import QUANTITIES, Head, Vocabulary, divergences
from fipo_megatron.config import Config
from fipo_megatron.config.padding import micro_batch_multiple, token_multiple
from fipo_megatron.data.packing import MicroBatch, plan_micro_batches
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class Source:
    """A model to load.

    Attributes:
        path: Hugging Face directory, or Megatron checkpoint (torch_dist).
        architecture: Architecture of the model.
    """

    path: Path
    architecture: Architecture

    @property
    def is_checkpoint(self) -> bool:
        """Whether the model is a Megatron checkpoint."""
        return (self.path / torch_dist.METADATA).is_file()


class TeacherForcedModel:
    """One model on this rank, for forward passes.

    Args:
        source: The model.
        config: Configuration; ``actor`` is read.
        layout: Layout of this rank. Its process groups must exist.

    Raises:
        ValueError: The model cannot be built in this layout.
        WeightsError: The files do not hold this model, or hold NaN or infinity.
    """

    def __init__(self, source: Source, config: Config, layout: RankLayout) -> None:
        self._layout = layout
        self.chunks = build_model(source.architecture, config.actor, layout)
        if source.is_checkpoint:
            load_weights(self.chunks, source.architecture, layout, source.path)
        else:
            load_hf(self.chunks, source.architecture, layout, source.path)
        check_finite(self.chunks, source.architecture, layout, str(source.path))
        for chunk in self.chunks:
            chunk.eval()
        self._routers = routers(self.chunks)

    def hidden_states(self, micros: Sequence[LocalMicroBatch]) -> list[Tensor]:
        """Returns final hidden states ``[T, H]`` of each micro-batch, the same on all tensor-parallel ranks.

        Returns:
            Nothing on pipeline stages before the last.
        """
        found: list[Tensor] = []

        def forward(
            iterator: Iterator[LocalMicroBatch], chunk: torch.nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            padding = {"padding_mask": micro.padding} if self._routers else {}
            hidden = chunk(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params, **padding)

            def keep(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                if self._layout.sequence_parallel:
                    group = parallel_state.get_tensor_model_parallel_group()
                    hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=group)
                found.append(hidden_SBH[:, 0])
                return hidden_SBH.new_zeros(()), micro.mask.sum().int(), {}

            return hidden, keep

        interleaved = len(self.chunks) > 1
        with torch.no_grad(), recompute_off(self.chunks):
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(micros) for _ in self.chunks] if interleaved else iter(micros),
                model=self.chunks if interleaved else self.chunks[0],
                num_microbatches=len(micros),
                seq_length=max(micro.tokens.shape[1] * self._layout.context.size for micro in micros),
                micro_batch_size=1,
                forward_only=True,
            )
        return found

    def head(self, hidden_TH: Tensor) -> Head:
        """Returns the output layer on this rank with hidden states; for the last pipeline stage."""
        return Head(self.chunks[-1].output_weight().detach(), hidden_TH)


class ModelPair:
    """The base model and the RL model on this rank.

    Args:
        base: The base model.
        rl: The RL model.
        config: Configuration; ``actor`` and ``compare`` are read.
        layout: Layout of this rank. Its process groups must exist.
    """

    def __init__(self, base: Source, rl: Source, config: Config, layout: RankLayout) -> None:
        self.config = replace(config, actor=replace(config.actor, fp8="off"))
        self.layout = layout
        self.base, self.rl = (TeacherForcedModel(source, self.config, layout) for source in (base, rl))
        size = parallel_state.get_tensor_model_parallel_world_size()
        group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
        self._vocabulary = Vocabulary(base.architecture.vocab, group)

    def rounds(self, lengths: Sequence[int], first: int = 0) -> Iterator[range]:
        """Yields the responses of each round: consecutive ones that fill the pipeline of every replica about once.

        Args:
            lengths: Tokens of each response with its prompt.
            first: Response to begin with.
        """
        stages, replicas = self.layout.pipeline_size, self.layout.data_size
        budget = self.config.actor.token_budget * replicas * (2 * stages if stages > 1 else 1)
        start, tokens = first, 0
        for index in range(first, len(lengths)):
            padded = self.layout.context.padded_length(lengths[index])
            if index > start and tokens + padded > budget:
                yield range(start, index)
                start, tokens = index, 0
            tokens += padded
        if start < len(lengths):
            yield range(start, len(lengths))

    def compare(self, trajectories: Sequence[Trajectory], members: range) -> dict[int, NDArray[np.float64]]:
        """Compares the models at every position of some responses. A collective of all ranks.

        Args:
            trajectories: All responses, with an advantage.
            members: Indices of the responses.

        Returns:
            :data:`.divergences.QUANTITIES` of each response, ``[K, R]``, on every rank.
        """
        micro_batches = self._plan(trajectories, members)
        micros = list(
            local_micro_batches(
                micro_batches,
                trajectories,
                self.layout,
                token_multiple=token_multiple(self.config.actor),
                boundaries_on_host=self.base.chunks[0].config.transformer_impl == "local",
            )
        )
        base, rl = self.base.hidden_states(micros), self.rl.hidden_states(micros)
        mine = []
        for batch, micro, hidden_base, hidden_rl in zip(
            micro_batches if base else (), micros if base else (), base, rl, strict=True
        ):
            rows = micro.mask.nonzero()[:, 0]
            found_KT = divergences(
                self.base.head(hidden_base[rows]),
                self.rl.head(hidden_rl[rows]),
                micro.labels[0, rows],
                self._vocabulary,
                temperature=self.config.compare.temperature,
                top_k=self.config.compare.top_k,
                chunk_tokens=self.config.actor.log_prob_chunk_tokens,
            )
            if self.layout.tensor_rank == 0:
                mine += _by_response(found_KT.cpu().numpy(), rows.cpu().numpy(), batch, trajectories, micro)
        everyone: list[list[tuple[int, NDArray[np.int64], NDArray[np.float64]]]] = [[]] * self.layout.world_size
        dist.all_gather_object(everyone, mine)
        joined = {i: np.full((len(QUANTITIES), len(trajectories[i].tokens)), np.nan) for i in members}
        for index, positions, values_KT in (part for parts in everyone for part in parts):
            joined[index][:, positions] = values_KT
        return joined

    def _plan(self, trajectories: Sequence[Trajectory], members: range) -> Sequence[MicroBatch]:
        """Returns the micro-batches of this data-parallel rank."""
        multiple, budget = micro_batch_multiple(self.config.actor), self.config.actor.token_budget
        lengths = [self.layout.context.padded_length(len(trajectories[i])) for i in members]
        (plan,) = plan_micro_batches(
            lengths,
            [range(len(lengths))],
            token_budget=budget // multiple * multiple,
            data_parallel_size=self.layout.data_size,
            micro_batch_multiple=self.layout.pipeline_size if self.layout.virtual_size > 1 else 1,
        )
        own = plan.micro_batches[self.layout.data_rank]
        return [tuple(members[i] for i in batch) for batch in own]


def _by_response(
    values_KT: NDArray[np.float64],
    rows: NDArray[np.int64],
    members: MicroBatch,
    trajectories: Sequence[Trajectory],
    micro: LocalMicroBatch,
) -> list[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
    """Divides the numbers of a micro-batch by response: index, positions in the response, ``[K, positions]``."""
    positions = micro.position_ids[0].cpu().numpy()[rows]
    ends = np.cumsum(micro.shards.chunk_lengths.cpu().numpy() * micro.shards.num_slots)
    owner = np.searchsorted(ends, rows, side="right")
    found = []
    for number, index in enumerate(members):
        here = owner == number
        # The numbers of token p + 1 stand at position p.
        found.append((index, positions[here] - (len(trajectories[index].prompt.tokens) - 1), values_KT[:, here]))
    return found
