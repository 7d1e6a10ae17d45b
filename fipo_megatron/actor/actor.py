"""MegatronActor: log-probs of, and FIPO updates on, packed long sequences under every parallelism.

Every rank runs the same calls in the same order. Every pass goes through Megatron's own ``get_forward_backward_func``,
so that one code serves one rank and pipelines of interleaved stages. The loss is a sum and a count; Megatron divides by
the global count (``calculate_per_token_loss``), so that the gradient does not depend on how the work was split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from fipo_megatron.actor.fp8 import drop_weight_copies, frozen_scaling
from fipo_megatron.actor.log_probs import TokenLogProbs, megatron_token_log_probs
from fipo_megatron.actor.megatron_config import check_auxiliary_losses, token_multiple
from fipo_megatron.actor.micro_batches import LocalMicroBatch, local_micro_batches
from fipo_megatron.actor.model import HiddenStateGPTModel, build_model
from fipo_megatron.actor.offload import Offloaded
from fipo_megatron.actor.optimizer import build_optimizer, wrap_for_training
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.update_metrics import (
    NoiseError,
    NoiseFloor,
    Reduced,
    TokenPart,
    UpdateMetrics,
    reduce_outputs,
    token_parts,
)
from fipo_megatron.algorithm.future_kl import gather_over
from fipo_megatron.algorithm.policy_loss import LossInputs, LossOutput, policy_loss
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig
from fipo_megatron.config import Config
from fipo_megatron.data.packing import MicroBatch, MiniBatch, plan_micro_batches
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.weights.architecture import Architecture

logger = logging.getLogger(__name__)

Trajectories = Mapping[int, Trajectory] | Sequence[Trajectory]
StoredLogProbs = list[list[TokenLogProbs | None]]
"""By mini-batch and micro-batch of this data-parallel rank: this context-parallel rank's part, ``[T]`` each; None on
pipeline stages before the last."""


class MegatronActor:
    """The policy on this rank.

    Attributes:
        skipped_steps: Optimizer steps that were skipped so far. May be set.
        learning_rate_factor: The rates of the schedule are multiplied by it. May be set.

    Args:
        config: Of the run; ``actor``, ``algorithm``, ``rollout.temperature`` and ``actor.parallel`` are read.
        architecture: Of the model.
        layout: Of this rank, whose process groups are up (:func:`.parallel.initialize`).
        load: Fills the chunks' parameters before the optimizer copies them.

    Raises:
        ValueError: the model cannot be built, or the loss not computed, as configured; nothing has been built then.
    """

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        layout: RankLayout,
        load: Callable[[list[HiddenStateGPTModel]], None],
    ) -> None:
        check_auxiliary_losses(config)
        self.config = config
        self.layout = layout
        self.chunks = build_model(architecture, config.actor, layout)
        load(self.chunks)
        self.wrapped: list[DistributedDataParallel] = wrap_for_training(self.chunks, config.actor)
        self.optimizer, self.schedule = build_optimizer(self.wrapped, config.actor)
        self.skipped_steps = 0
        self.learning_rate_factor = 1.0
        self._away = 0
        # The gate asks for d and F; the other terms of the loss may need what is not there.
        self._drift_only = replace(config.algorithm, kl_coef=0.0, entropy_coef=0.0, importance_cap=None)
        self.token_multiple = token_multiple(config.actor)
        self._micro_batch_multiple = layout.pipeline_size if layout.virtual_size > 1 else 1
        self._reference: list[Tensor] | None = None
        self._exchange = gather_over(parallel_state.get_context_parallel_group())

    def plan(self, lengths: Sequence[int], mini_batches: Sequence[Sequence[int]]) -> tuple[MiniBatch, ...]:
        """The micro-batches of a step, as this actor's layout needs them: the same on every rank.

        Args:
            lengths: Tokens of each trajectory of the step, prompt included, without padding.
            mini_batches: Indices of the trajectories of each mini-batch (:func:`.data.packing.split_mini_batches`).

        Raises:
            ValueError: see :func:`.data.packing.plan_micro_batches`.
        """
        return plan_micro_batches(
            [self.layout.context.padded_length(length, self.token_multiple) for length in lengths],
            mini_batches,
            token_budget=self.config.actor.token_budget,
            data_parallel_size=self.layout.data_size,
            micro_batch_multiple=self._micro_batch_multiple,
        )

    def log_probs(self, plan: Sequence[MiniBatch], trajectories: Trajectories) -> StoredLogProbs:
        """log π and entropy of every label under the current weights, in the packing that :meth:`update` will use.

        Args:
            plan: Of the whole step (:meth:`plan`).
            trajectories: At least those of this data-parallel rank, with advantages.

        Returns:
            Without gradient, on the device.

        Raises:
            ValueError: a plan for another layout.
            RuntimeError: the actor is offloaded.
        """
        stored = []
        for mini_batch in plan:
            results: dict[int, TokenLogProbs] = {}

            def keep(index: int, micro: LocalMicroBatch, found: TokenLogProbs) -> tuple[Tensor, Tensor, dict[str, Any]]:
                results[index] = found  # noqa: B023 - the pass ends before the next mini-batch begins
                return torch.zeros_like(found.log_probs[0]), micro.mask.sum().int(), {}

            with torch.no_grad(), frozen_scaling(self.chunks):
                count = self._run(mini_batch, trajectories, keep, with_entropy=True, forward_only=True)
            stored.append([results.get(index) for index in range(count)])
        return stored

    def update(
        self,
        plan: Sequence[MiniBatch],
        trajectories: Trajectories,
        old: StoredLogProbs | None,
        reference: StoredLogProbs | None = None,
        watch: Collection[int] = (),
    ) -> list[UpdateMetrics]:
        """One optimizer step per mini-batch of the plan.

        A mini-batch with a non-finite loss or gradient on any rank, or without a token left in the loss, changes
        nothing on any rank and is counted.

        Args:
            plan: As given to :meth:`log_probs`.
            trajectories: As given to :meth:`log_probs`.
            old: What :meth:`log_probs` returned before the first update on this plan; None for ``sft``, which has no
                use for it.
            reference: What :meth:`reference_log_probs` returned; needed where ``algorithm.kl_coef`` > 0.
            watch: Indices of trajectories whose tokens are wanted in ``UpdateMetrics.tokens``.

        Raises:
            ValueError: log-probs of another plan, a reference missing, or a plan for another layout.
            RuntimeError: the actor is offloaded.
        """
        if old is None and self.config.algorithm.kind != "sft":
            raise ValueError(f"old: missing, needed for algorithm.kind = {self.config.algorithm.kind}")
        if self.config.algorithm.kl_coef and reference is None:
            raise ValueError(f"reference: missing, needed for algorithm.kl_coef = {self.config.algorithm.kl_coef:g}")
        for name, stored in (("old", old), ("reference", reference)):
            if stored is not None and [len(part) for part in stored] != [
                self._num_micro_batches(part) for part in plan
            ]:
                raise ValueError(f"{name}: not the log-probs of this plan")
        return [
            self._step(
                mini_batch,
                trajectories,
                old[number] if old else None,
                reference[number] if reference else None,
                frozenset(watch),
            )
            for number, mini_batch in enumerate(plan)
        ]

    def noise_floor(self, mini_batch: MiniBatch, trajectories: Trajectories, old: StoredLogProbs) -> NoiseFloor | None:
        """Runs the training pass of a mini-batch at unchanged weights and compares it with the log-prob pass.

        Both are real passes: forward and backward through the training schedule here, forward alone in ``old``. Nothing
        is changed: the gradients are thrown away.

        Args:
            mini_batch: The first of a plan.
            trajectories: As given to :meth:`log_probs`.
            old: What :meth:`log_probs` returned for ``[mini_batch]``.

        Returns:
            None: no token of the mini-batch is in the loss.
        """
        with frozen_scaling(self.chunks):
            statistics = self._forward_backward(mini_batch, trajectories, old[0], None, self._drift_only).statistics
        self._zero_grad()
        if not statistics["tokens"]:
            return None
        return NoiseFloor(statistics["shift_abs_max"], statistics.get("future_kl_abs_max", 0.0))

    def check_noise_floor(
        self, mini_batch: MiniBatch, trajectories: Trajectories, *, warm_up: bool = True
    ) -> NoiseFloor | None:
        """The lr = 0 gate: the noise floor, within ``actor.max_noise_shift`` and ``actor.max_noise_future_kl``.

        Args:
            mini_batch: The first of a plan.
            trajectories: As given to :meth:`log_probs`.
            warm_up: Under delayed FP8 scaling, measure the tensors before: scales are not loaded.

        Returns:
            None: no token of the mini-batch is in the loss.

        Raises:
            NoiseError: it is not; FIPO would weigh tokens by noise.
        """
        actor = self.config.actor
        if actor.fp8 != "off" and actor.fp8_recipe == "delayed" and warm_up:
            # Every delayed scale is 1 until a first training pass has measured the tensors.
            self._forward_backward(
                mini_batch, trajectories, self.log_probs([mini_batch], trajectories)[0], None, self._drift_only
            )
            self._zero_grad()
        floor = self.noise_floor(mini_batch, trajectories, self.log_probs([mini_batch], trajectories))
        if floor is None:
            return None
        for field, value in (("max_noise_shift", floor.shift), ("max_noise_future_kl", floor.future_kl)):
            bound = getattr(actor, field)
            if not value <= bound:
                raise NoiseError(
                    f"actor.{field} = {bound:g}: the log-prob pass and the training pass differ by {value:g} at equal "
                    "weights; look for kernels that are not deterministic, FP8 scaling, or different packing",
                    floor,
                )
        logger.info("noise floor at equal weights: |d| <= %.3g, |F| <= %.3g", floor.shift, floor.future_kl)
        return floor

    def keep_reference(self) -> None:
        """Keeps a copy of the current parameters on the host as the reference policy of the KL term.

        Call it on the weights that are meant: those of the start, before a checkpoint is loaded.
        """
        self._reference = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    def reference_log_probs(self, plan: Sequence[MiniBatch], trajectories: Trajectories) -> StoredLogProbs:
        """:meth:`log_probs` under the weights that :meth:`keep_reference` kept; the current weights come back after.

        Raises:
            RuntimeError: no reference was kept.
        """
        if self._reference is None:
            raise RuntimeError("reference_log_probs: call keep_reference() first")
        current = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]
        with torch.no_grad():
            _copy_all(self._reference, self._parameters())
            try:
                return self.log_probs(plan, trajectories)
            finally:
                _copy_all(current, self._parameters())

    @contextmanager
    def offloaded(self, *, parameters: bool = True, gradients: bool = True, optimizer: bool = True) -> Iterator[int]:
        """Frees device memory while the engine generates; yields the bytes freed.

        Parameters and optimizer state wait on the host; gradients are dropped, they are zero between steps.
        """
        away = []
        if optimizer:
            away.append(Offloaded(self._optimizer_tensors(), keep=True))
        if parameters:
            away.append(Offloaded(self._parameters(), keep=True))
        if gradients:
            away.append(Offloaded((buffer.grad_data for buffer in self._gradient_buffers()), keep=False))
        freed = 0
        if parameters:
            drop_weight_copies(self.chunks)
        self._away += 1
        for each in away:
            each.free()
            freed += each.num_bytes
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield freed
        finally:
            for each in reversed(away):
                each.restore()
            self._away -= 1

    def _step(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        old: list[TokenLogProbs | None] | None,
        reference: list[TokenLogProbs | None] | None,
        watch: frozenset[int],
    ) -> UpdateMetrics:
        tokens: dict[int, TokenPart] = {}
        found = self._forward_backward(mini_batch, trajectories, old, reference, watch=watch, tokens=tokens)
        loss = found.numerator / found.denominator if found.denominator else math.nan
        # A NaN loss need not have NaN gradients: max(NaN, NaN) passes none on.
        if not found.denominator:
            skipped = "empty loss"
        elif not math.isfinite(found.numerator):
            skipped = "non-finite loss"
        else:
            skipped = "" if self._gradient_is_finite() else "non-finite gradient"
        grad_norm = rate = math.nan
        if skipped:
            self.skipped_steps += 1
            if self.layout.rank == 0:
                logger.warning("optimizer step skipped on all ranks: %s (%d so far)", skipped, self.skipped_steps)
        else:
            self.schedule.step(1)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.learning_rate_factor
            _, grad_norm, _ = self.optimizer.step()
            rate = self.optimizer.param_groups[0]["lr"]
        self._zero_grad()
        return UpdateMetrics(
            loss,
            int(found.denominator),
            float(grad_norm),
            float(rate),
            skipped,
            found.statistics,
            found.shifts,
            tokens,
        )

    def _forward_backward(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        old: list[TokenLogProbs | None] | None,
        reference: list[TokenLogProbs | None] | None,
        algorithm: PolicyLossConfig | None = None,
        *,
        watch: frozenset[int] = frozenset(),
        tokens: dict[int, TokenPart] | None = None,
    ) -> Reduced:
        """Gradients of a mini-batch; what came of it over all ranks, on every rank. Fills ``tokens``."""
        outputs: list[LossOutput] = []
        algorithm = algorithm or self.config.algorithm
        with_entropy = algorithm.entropy_coef != 0
        sampled = algorithm.kind != "sft"  # an example has no engine's log-probs
        members = mini_batch.micro_batches[self.layout.data_rank] if watch else ()

        def loss(index: int, micro: LocalMicroBatch, found: TokenLogProbs) -> tuple[Tensor, Tensor, dict[str, Any]]:
            before = old[index] if old else TokenLogProbs(found.log_probs.detach(), None)
            anchor = reference[index] if reference else None
            assert before is not None
            output = policy_loss(
                LossInputs(
                    log_probs=found.log_probs,
                    old_log_probs=before.log_probs,
                    advantages=micro.advantages,
                    mask=micro.mask,
                    shards=micro.shards,
                    reference_log_probs=anchor.log_probs if anchor else None,
                    behaviour_log_probs=micro.behaviour_log_probs if sampled else None,
                    entropy=found.entropy if with_entropy else before.entropy,
                ),
                algorithm,
                self._exchange,
            )
            outputs.append(output)
            if tokens is not None and members and self.layout.tensor_rank == 0:
                prompts = [len(trajectories[i].prompt.tokens) for i in members[index]]
                tokens.update(token_parts(watch, members[index], prompts, micro, before, found, output))
            return output.numerator, output.denominator.int(), {}

        self._zero_grad()
        self._run(mini_batch, trajectories, loss, with_entropy=with_entropy, forward_only=False)
        return reduce_outputs(outputs, self.layout)

    def _run(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        loss: Callable[[int, LocalMicroBatch, TokenLogProbs], tuple[Tensor, Tensor, dict[str, Any]]],
        *,
        with_entropy: bool,
        forward_only: bool,
    ) -> int:
        """One pass over this rank's micro-batches; ``loss`` is called on the last stage. Returns their number."""
        if self._away:
            raise RuntimeError("the actor is offloaded: leave the block of offloaded() first")
        self._num_micro_batches(mini_batch)
        members: Sequence[MicroBatch] = mini_batch.micro_batches[self.layout.data_rank]
        micros = list(
            enumerate(
                local_micro_batches(
                    members,
                    trajectories,
                    self.layout,
                    token_multiple=self.token_multiple,
                    mask_truncated=self.config.algorithm.mask_truncated,
                    boundaries_on_host=self.chunks[0].config.transformer_impl == "local",
                )
            )
        )

        def forward(
            iterator: Iterator[tuple[int, LocalMicroBatch]], chunk: torch.nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            index, micro = next(iterator)
            hidden = chunk(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)

            def finish(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                return loss(index, micro, self._token_log_probs(hidden_SBH, micro, with_entropy))

            return hidden, finish

        interleaved = len(self.wrapped) > 1
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micros) for _ in self.wrapped] if interleaved else iter(micros),
            model=self.wrapped if interleaved else self.wrapped[0],
            num_microbatches=len(micros),
            seq_length=max(micro.tokens.shape[1] * self.layout.context.size for _, micro in micros),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return len(micros)

    def _num_micro_batches(self, mini_batch: MiniBatch) -> int:
        """Of one rank; raises ValueError, on all ranks alike, where the plan was made for another layout."""
        ranks = len(mini_batch.micro_batches)
        if ranks != self.layout.data_size:
            raise ValueError(f"plan: made for {ranks} data-parallel ranks, there are {self.layout.data_size}")
        if (number := len(mini_batch.micro_batches[0])) % self._micro_batch_multiple:
            raise ValueError(
                f"plan: {number} micro-batches per rank; the interleaved schedule needs a multiple of "
                f"{self._micro_batch_multiple}"
            )
        return number

    def _token_log_probs(self, hidden_SBH: Tensor, micro: LocalMicroBatch, with_entropy: bool) -> TokenLogProbs:
        last = self.chunks[-1]
        found = megatron_token_log_probs(
            hidden_SBH,
            last.output_weight(),
            micro.labels,
            group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.layout.sequence_parallel,
            temperature=self.config.rollout.temperature,
            chunk_tokens=self.config.actor.log_prob_chunk_tokens,
            vocab_size=last.true_vocab_size,
            with_entropy=with_entropy,
        )
        return TokenLogProbs(found.log_probs[0], None if found.entropy is None else found.entropy[0])

    def _gradient_is_finite(self) -> bool:
        """Whether every gradient of every rank is finite, and so is its norm; the same answer everywhere."""
        norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in self._gradient_buffers()]
        bad = torch.stack([norm.isfinite().logical_not() for norm in norms]).any().int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad.item()

    def _zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def _gradient_buffers(self) -> list[Any]:
        return [buffer for chunk in self.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Main parameters and moments; those that alias model parameters are left to the parameters."""
        model = {parameter.untyped_storage().data_ptr() for parameter in self._parameters()}
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = optimizer.optimizer
            tensors = [parameter.data for group in inner.param_groups for parameter in group["params"]]
            tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
            yield from (tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in model)


def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
