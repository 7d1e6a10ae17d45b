"""MegatronActor: log-probs of packed sequences and FIPO updates on them, under every parallelism.

Every rank makes the same calls in the same order. Every pass goes through Megatron's ``get_forward_backward_func``, so
the same code serves a single rank and an interleaved pipeline. The loss is a sum and a count. Megatron divides by the
global count (``calculate_per_token_loss``), so the gradient does not depend on how the work was split.
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

from fipo_megatron.actor import noise_floor
from fipo_megatron.actor.fp8 import drop_weight_copies, frozen_scaling
from fipo_megatron.actor.log_probs import TokenLogProbs, megatron_token_log_probs
from fipo_megatron.actor.megatron_config import check_auxiliary_losses
from fipo_megatron.actor.micro_batches import (
    LocalMicroBatch,
    count_divisor,
    count_micro_batches,
    each_to_all,
    local_micro_batches,
)
from fipo_megatron.actor.model import HiddenStateGPTModel, build_model
from fipo_megatron.actor.model_tensors import gradient_buffers, optimizer_state
from fipo_megatron.actor.offload import Offloaded
from fipo_megatron.actor.optimizer import build_optimizer, wrap_for_training
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.recompute import recompute_off
from fipo_megatron.actor.reference import ReferencePolicy
from fipo_megatron.actor.router_losses import balances_load, measured_loads, routers
from fipo_megatron.actor.update_metrics import (
    NoiseFloor,
    TokenPart,
    UpdateMetrics,
    check_skipped,
    reduce_outputs,
    token_parts,
)
from fipo_megatron.algorithm.future_kl import gather_over
from fipo_megatron.algorithm.policy_loss import LossInputs, LossOutput, policy_loss
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig
from fipo_megatron.config import Config
from fipo_megatron.config.padding import micro_batch_multiple, token_multiple
from fipo_megatron.data.packing import MicroBatch, MiniBatch, packed_tokens, plan_micro_batches
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.observe import progress
from fipo_megatron.observe.profiling import span
from fipo_megatron.observe.throughput import sequence_cost
from fipo_megatron.weights.architecture import Architecture

logger = logging.getLogger(__name__)

Trajectories = Mapping[int, Trajectory] | Sequence[Trajectory]
StoredLogProbs = list[list[TokenLogProbs | None]]
"""Log-probs per mini-batch and micro-batch of this data-parallel rank: this context-parallel rank's part, ``[T]`` each;
None on pipeline stages before the last."""


class MegatronActor:
    """The policy on this rank.

    Attributes:
        skipped_steps: Number of optimizer steps skipped so far. May be set.
        learning_rate_factor: Factor on the learning rates of the schedule. May be set.

    Args:
        config: Configuration of the run; ``actor``, ``algorithm`` and ``rollout.temperature`` are read.
        architecture: Architecture of the model.
        layout: Layout of this rank. Its process groups must exist (:func:`.parallel.initialize`).
        load: Callback that fills the chunks' parameters before the optimizer copies them.

    Raises:
        ValueError: the model cannot be built, or the loss not computed, as configured. Nothing has been built.
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
        self.skipped_steps = self._skipped_in_a_row = 0
        self.learning_rate_factor = 1.0
        self._offload_depth = 0
        self.token_multiple = token_multiple(config.actor)
        self._cost = sequence_cost(architecture)
        self._reference: ReferencePolicy | None = None
        self._exchange = gather_over(parallel_state.get_context_parallel_group())
        self._routers = routers(self.chunks)

    def plan(self, lengths: Sequence[int], mini_batches: Sequence[Sequence[int]]) -> tuple[MiniBatch, ...]:
        """Returns the micro-batches of a step for this actor's layout, the same on every rank.

        Args:
            lengths: Number of tokens of each trajectory of the step, prompt included, without padding.
            mini_batches: Indices of the trajectories of each mini-batch (:func:`.data.packing.split_mini_batches`).

        Raises:
            ValueError: see :func:`.data.packing.plan_micro_batches`.
        """
        # The end of a micro-batch is padded, too: only whole multiples fit into the budget.
        multiple, budget = micro_batch_multiple(self.config.actor), self.config.actor.token_budget
        return plan_micro_batches(
            [self.layout.context.padded_length(length) for length in lengths],
            mini_batches,
            token_budget=budget // multiple * multiple,
            data_parallel_size=self.layout.data_size,
            micro_batch_multiple=count_divisor(self.layout),
            cost=self._cost,
        )

    def log_probs(self, plan: Sequence[MiniBatch], trajectories: Trajectories) -> StoredLogProbs:
        """Computes log π and entropy of every label under the current weights, in the packing of :meth:`update`.

        Args:
            plan: Micro-batches of the whole step (:meth:`plan`).
            trajectories: Trajectories of at least this data-parallel rank, with advantages.

        Returns:
            Log-probs without gradient, on the device.

        Raises:
            ValueError: the plan was made for another layout.
            RuntimeError: the actor is offloaded.
        """
        stored = []
        for mini_batch in plan:
            results: dict[int, TokenLogProbs] = {}

            def keep(micro: LocalMicroBatch, found: TokenLogProbs) -> tuple[Tensor, Tensor, dict[str, Any]]:
                results[micro.index] = found  # noqa: B023 - the pass ends before the next mini-batch begins
                return torch.zeros_like(found.log_probs[0]), micro.mask.sum().int(), {}

            with self._without_backward():
                count = self._run(mini_batch, trajectories, keep, with_entropy=True, forward_only=True)
            stored.append([results.get(index) for index in range(count)])
        return stored

    def update(
        self,
        plan: Sequence[MiniBatch],
        trajectories: Trajectories,
        old: Sequence[list[TokenLogProbs | None] | None] | None,
        reference: StoredLogProbs | None = None,
        watch: Collection[int] = (),
    ) -> list[UpdateMetrics]:
        """Takes one optimizer step per mini-batch of the plan.

        A mini-batch is skipped on all ranks if its loss or gradient is not finite on any rank, or if no token is in the
        loss. Skipped steps are counted and change nothing.

        Args:
            plan: Plan passed to :meth:`log_probs`.
            trajectories: Trajectories passed to :meth:`log_probs`.
            old: Result of :meth:`log_probs` before the first update on this plan; None for ``sft``, which does not use
                it. Its first entry may be None: the first update begins at π_old and takes the log-probs of its own
                pass.
            reference: Result of :meth:`reference_log_probs`; required if ``algorithm.kl_coef`` > 0.
            watch: Indices of the trajectories whose tokens are returned in ``UpdateMetrics.tokens``.

        Raises:
            ValueError: the log-probs belong to another plan, ``old`` or ``reference`` is missing, or the plan was made
                for another layout.
            RuntimeError: the actor is offloaded.
            UpdatesSkippedError: see :func:`.update_metrics.check_skipped`.
        """
        if old is None and self.config.algorithm.kind != "sft":
            raise ValueError(f"old: missing, needed for algorithm.kind = {self.config.algorithm.kind}")
        if self.config.algorithm.kl_coef and reference is None:
            raise ValueError(f"reference: missing, needed for algorithm.kl_coef = {self.config.algorithm.kl_coef:g}")
        for name, stored in (("old", old), ("reference", reference)):
            if stored is None:
                continue
            counts: list[int | None] = [count_micro_batches(part, self.layout) for part in plan]
            found = [None if part is None else len(part) for part in stored]
            if name == "old" and counts and found[:1] == [None]:
                counts[0] = None
            if found != counts:
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
        """Measures the noise floor at unchanged weights; see :func:`.noise_floor.measure`."""
        return noise_floor.measure(self, mini_batch, trajectories, old)

    def check_noise_floor(
        self, mini_batch: MiniBatch, trajectories: Trajectories, *, warm_up: bool = True
    ) -> NoiseFloor | None:
        """Measures the noise floor and raises NoiseError above its bounds; see :func:`.noise_floor.check`."""
        return noise_floor.check(self, mini_batch, trajectories, warm_up=warm_up)

    def keep_reference(self) -> None:
        """Copies the current parameters to the host as the reference policy of the KL term.

        Call it on the initial weights, before a checkpoint is loaded.
        """
        self._reference = ReferencePolicy(self.parameters())

    def reference_log_probs(self, plan: Sequence[MiniBatch], trajectories: Trajectories) -> StoredLogProbs:
        """Computes :meth:`log_probs` under the reference policy, then restores the current weights.

        Raises:
            RuntimeError: :meth:`keep_reference` was not called.
        """
        if self._reference is None:
            raise RuntimeError("reference_log_probs: call keep_reference() first")
        with self._reference.loaded_into(self.parameters()):
            return self.log_probs(plan, trajectories)

    @contextmanager
    def offloaded(self, *, parameters: bool = True, gradients: bool = True, optimizer: bool = True) -> Iterator[int]:
        """Frees device memory while the engine generates; yields the number of bytes freed.

        Parameters and optimizer state are kept on the host. Gradients are dropped: they are zero between steps.
        """
        offloaded = []
        if optimizer:
            offloaded.append(Offloaded(self.optimizer_state(), keep=True))
        if parameters:
            offloaded.append(Offloaded(self.parameters(), keep=True))
        if gradients:
            offloaded.append(Offloaded(self.gradients(), keep=False))
        freed = 0
        if parameters:
            drop_weight_copies(self.chunks)
        self._offload_depth += 1
        for each in offloaded:
            each.free()
            freed += each.num_bytes
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield freed
        finally:
            for each in reversed(offloaded):
                each.restore()
            self._offload_depth -= 1

    def forward_backward(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        old: list[TokenLogProbs | None] | None,
        reference: list[TokenLogProbs | None] | None = None,
        *,
        algorithm: PolicyLossConfig | None = None,
        watch: frozenset[int] = frozenset(),
    ) -> UpdateMetrics:
        """Computes the gradients of a mini-batch. Takes no optimizer step.

        Args:
            mini_batch: Mini-batch of the plan.
            trajectories: Trajectories passed to :meth:`log_probs`.
            old: Log-probs under π_old of each micro-batch; None: those of the pass itself.
            reference: Log-probs under the reference policy of each micro-batch; None if the loss has no KL term.
            algorithm: Loss; None: ``config.algorithm``.
            watch: Indices of the trajectories whose tokens are returned.

        Returns:
            Metrics over all ranks, the same on every rank except ``tokens``; gradient norm and learning rate are NaN.
        """
        outputs: list[LossOutput] = []
        tokens: dict[int, TokenPart] = {}
        algorithm = algorithm or self.config.algorithm
        learns_entropy = algorithm.entropy_coef != 0
        with_entropy = learns_entropy or (old is None and algorithm.kind != "sft")
        sampled = algorithm.kind != "sft"  # SFT examples have no log-probs of the engine
        members = mini_batch.micro_batches[self.layout.data_rank] if watch else ()

        def loss(micro: LocalMicroBatch, found: TokenLogProbs) -> tuple[Tensor, Tensor, dict[str, Any]]:
            before = old[micro.index] if old else found.detach()
            anchor = reference[micro.index] if reference else None
            assert before is not None
            inputs = LossInputs(
                log_probs=found.log_probs,
                old_log_probs=before.log_probs,
                advantages=micro.advantages,
                mask=micro.mask,
                shards=micro.shards,
                reference_log_probs=anchor.log_probs if anchor else None,
                behaviour_log_probs=micro.behaviour_log_probs if sampled else None,
                entropy=found.entropy if learns_entropy else before.entropy,
            )
            with span("policy_loss"):
                output = policy_loss(inputs, algorithm, self._exchange)
            outputs.append(output)
            if members and self.layout.tensor_rank == 0:
                prompts = [len(trajectories[i].prompt.tokens) for i in members[micro.index]]
                tokens.update(token_parts(watch, members[micro.index], prompts, micro, before, found, output))
            return output.numerator, output.denominator.int(), {}

        self.zero_grad()
        if balances_load(self.chunks[0].config):
            with self._without_backward(), measured_loads(self._routers):
                self._run(mini_batch, trajectories, None, with_entropy=False, forward_only=True)
        self._run(mini_batch, trajectories, loss, with_entropy=with_entropy, forward_only=False)
        return replace(reduce_outputs(outputs, self.layout), tokens=tokens)

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _step(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        old: list[TokenLogProbs | None] | None,
        reference: list[TokenLogProbs | None] | None,
        watch: frozenset[int],
    ) -> UpdateMetrics:
        metrics = self.forward_backward(mini_batch, trajectories, old, reference, watch=watch)
        # A NaN loss need not have NaN gradients: max(NaN, NaN) passes none on.
        if not metrics.denominator:
            skipped = "empty loss"
        elif not math.isfinite(metrics.loss):
            skipped = "non-finite loss"
        else:
            skipped = "" if self._gradient_is_finite() else "non-finite gradient"
        grad_norm = rate = math.nan
        if skipped:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            if self.layout.rank == 0:
                logger.warning("optimizer step skipped on all ranks: %s (%d so far)", skipped, self.skipped_steps)
            check_skipped(self.config, self._skipped_in_a_row, skipped)
        else:
            self._skipped_in_a_row = 0
            self.schedule.step(1)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.learning_rate_factor
            with span("optimizer_step"):
                _, grad_norm, _ = self.optimizer.step()
            rate = self.optimizer.param_groups[0]["lr"]
        self.zero_grad()
        return replace(metrics, grad_norm=float(grad_norm), learning_rate=float(rate), skipped=skipped)

    def _run(
        self,
        mini_batch: MiniBatch,
        trajectories: Trajectories,
        loss: Callable[[LocalMicroBatch, TokenLogProbs], tuple[Tensor, Tensor, dict[str, Any]]] | None,
        *,
        with_entropy: bool,
        forward_only: bool,
    ) -> int:
        """Runs one pass over this rank's micro-batches with ``loss`` on the last stage; returns their number."""
        if self._offload_depth:
            raise RuntimeError("the actor is offloaded: leave the block of offloaded() first")
        count = count_micro_batches(mini_batch, self.layout)
        members: Sequence[MicroBatch] = mini_batch.micro_batches[self.layout.data_rank]
        micros = local_micro_batches(
            members,
            trajectories,
            self.layout,
            token_multiple=self.token_multiple,
            mask_truncated=self.config.algorithm.mask_truncated,
            boundaries_on_host=self.chunks[0].config.transformer_impl == "local",
        )
        # Every chunk of the model passes over all of them; they are freed after the last.
        iterators = each_to_all(micros, len(self.wrapped))

        def forward(
            iterator: Iterator[LocalMicroBatch], chunk: torch.nn.Module
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            progress.sign()
            padding = {"padding_mask": micro.padding} if self._routers else {}
            with span("forward"):
                hidden = chunk(
                    micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params, **padding
                )

            def finish(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                if loss is None:
                    return hidden_SBH.new_zeros(()), micro.mask.sum().int(), {}
                return loss(micro, self._token_log_probs(hidden_SBH, micro, with_entropy))

            return hidden, finish

        interleaved = len(self.wrapped) > 1
        lengths = [[len(trajectories[i]) for i in micro_batch] for micro_batch in members]
        with span("forward_only" if forward_only else "forward_backward"):
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iterators if interleaved else iterators[0],
                model=self.wrapped if interleaved else self.wrapped[0],
                num_microbatches=count,
                seq_length=max(packed_tokens(each, self.layout.context, self.token_multiple) for each in lengths),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return count

    @contextmanager
    def _without_backward(self) -> Iterator[None]:
        """Opens a block for passes without a backward pass, which leave no trace in the state of FP8."""
        with torch.no_grad(), frozen_scaling(self.chunks), recompute_off(self.chunks):
            yield

    def _token_log_probs(self, hidden_SBH: Tensor, micro: LocalMicroBatch, with_entropy: bool) -> TokenLogProbs:
        last = self.chunks[-1]
        with span("token_log_probs"):
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
        """Returns whether all gradients of all ranks and their norms are finite, the same value on every rank."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients()]
        bad = torch.stack([norm.isfinite().logical_not() for norm in norms]).any().int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad.item()

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns the parameters of all chunks of this rank."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def gradients(self) -> list[Tensor]:
        """Returns the gradient buffers (:func:`.model_tensors.gradient_buffers`)."""
        return gradient_buffers(self.wrapped)

    def optimizer_state(self) -> Iterator[Tensor]:
        """Yields main parameters and moments (:func:`.model_tensors.optimizer_state`)."""
        return optimizer_state(self.optimizer, self.parameters())
