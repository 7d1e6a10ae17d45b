"""Auxiliary losses of a mixture's routers, as sums over the tokens of a mini-batch.

With c and z for ``moe_aux_loss_coeff`` and ``moe_z_loss_coeff``, E experts, k experts per token, T tokens in the
mini-batch (prompts included, padding left out) and D tokens in the policy loss, every router adds

    1 / D · Σ_x ( c · E · Σ_i f_i p_i(x) + z · logsumexp(logits(x))² )

to the loss of the mini-batch. p(x) is the softmax over all experts and f_i, without gradient, the fraction of the
mini-batch's T · k assignments that expert i received (Switch Transformer, arXiv 2101.03961, Eq. 4 to 6; over the whole
batch as in arXiv 2501.11873; z-loss: ST-MoE, arXiv 2202.08906, Eq. 5).

Megatron-Core's own losses (``transformer/moe/router.py``) depend on the layout. Version 0.16.1 divides both by the
number of ranks that share a micro-batch: line 466 multiplies by the tokens of one rank, ``finalize_model_grads``
divides by those of all. In every version f is that of a micro-batch, which depends on the packing, and padding counts.
f must be known before the first backward pass, so each mini-batch takes one more forward pass.

Logical shapes, as suffixes of names: T tokens of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class MiniBatchRouter(TopKRouter):  # type: ignore[misc]  # Megatron has no types
    """TopKRouter with the losses of this module in place of Megatron-Core's.

    Attributes:
        load_E: f, the fraction of the mini-batch's assignments that each expert received, float32; None before the
            first :func:`measured_loads`.
        counts_E: Assignments on this rank so far, int64; None outside of :func:`measured_loads`.
    """

    load_E: Tensor | None = None
    counts_E: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Selects the experts of each token and attaches the losses to the gradient of the logits.

        Args:
            logits: ``[S, B, E]``.
            padding_mask: Positions of padding, ``[S, B]`` bool; under sequence parallelism this rank's or all ranks'.
        """
        real_T = self._real_tokens(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            logits = MoEAuxLossAutoScaler.apply(logits, self._loss(logits, real_T))
        probs_TE, map_TE = super().routing(logits)
        if self.counts_E is not None:
            self.counts_E += (map_TE.bool() & real_T[:, None]).sum(0)
        return probs_TE, map_TE

    def is_aux_loss_enabled(self) -> bool:
        """Turns off Megatron-Core's load-balancing losses."""
        return False

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Turns off Megatron-Core's z-loss."""
        return logits

    def _loss(self, logits: Tensor, real_T: Tensor) -> Tensor:
        """Returns the sum over this rank's tokens, which Megatron divides by D with the policy loss."""
        logits_TE = logits.reshape(-1, self.num_experts)
        logits_TE = logits_TE.to(torch.promote_types(logits.dtype, torch.float32))
        loss = logits_TE.new_zeros(())
        if z := self.config.moe_z_loss_coeff:
            loss = loss + z * torch.where(real_T, logits_TE.logsumexp(-1).square(), 0.0).sum()
        if balances_load(self.config):
            if self.load_E is None:
                raise RuntimeError("load_E: missing; measure the loads of the mini-batch first")
            probs_E = torch.where(real_T[:, None], logits_TE.softmax(-1), 0.0).sum(0)
            loss = loss + self.config.moe_aux_loss_coeff * self.num_experts * (self.load_E * probs_E).sum()
        return loss

    def _real_tokens(self, logits: Tensor, padding_mask: Tensor | None) -> Tensor:
        tokens = logits.shape[0] * logits.shape[1]
        if padding_mask is None:
            return torch.ones(tokens, dtype=torch.bool, device=logits.device)
        padding_T = padding_mask.reshape(-1).bool()
        if len(padding_T) > tokens:  # Megatron-Core splits the mask on the first pipeline stage only
            padding_T = padding_T.view(-1, tokens)[self.tp_group.rank()]
        return ~padding_T


def has_losses(config: TransformerConfig) -> bool:
    """Returns whether the routers have an auxiliary loss."""
    return balances_load(config) or bool(config.num_moe_experts and config.moe_z_loss_coeff)


def balances_load(config: TransformerConfig) -> bool:
    """Returns whether the routers have a load-balancing loss, which needs the loads of the mini-batch."""
    wanted = config.moe_router_load_balancing_type != "none" and config.moe_aux_loss_coeff
    return bool(config.num_moe_experts and wanted)


def replace_routers(chunk: torch.nn.Module) -> None:
    """Gives the routers of a chunk the losses of this module, if its configuration has any.

    Routers are replaced after Megatron-Core has built them, because versions differ in how a specification names them.
    """
    for module in chunk.modules():
        if isinstance(module, TopKRouter) and has_losses(module.config):
            module.__class__ = MiniBatchRouter


def routers(chunks: Sequence[torch.nn.Module]) -> list[MiniBatchRouter]:
    """Returns the routers with auxiliary losses, in the order of the layers; empty without such losses."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, MiniBatchRouter)]


@contextmanager
def measured_loads(counted: Sequence[MiniBatchRouter]) -> Iterator[None]:
    """Counts the assignments of a forward pass over the mini-batch; sets ``load_E`` at the end of the block.

    A collective over the ranks that share this pipeline stage.
    """
    try:
        for router in counted:
            router.counts_E = torch.zeros(router.num_experts, dtype=torch.int64, device=router.weight.device)
        yield
        if not counted:
            return  # all layers of this stage are dense
        counts = torch.stack([router.counts_E for router in counted if router.counts_E is not None])
        dist.all_reduce(counts, group=counted[0].tp_dp_cp_group)
        for router, counts_E in zip(counted, counts, strict=True):
            router.load_E = counts_E.float() / counts_E.sum().clamp(min=1)
    finally:
        for router in counted:
            router.counts_E = None
