"""Builds the policy with Megatron-Core: this rank's chunks of layers, of which the last returns hidden states.

The layers are those of Transformer Engine if it is installed. Else they are Megatron-Core's own, with two modules they
lack: a norm for sequence parallelism, and a core attention for packed sequences under context parallelism, which also
applies the rotary embedding. On a CPU the activation of the MLPs is ours, too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from fipo_megatron.actor.attention import PackedCoreAttention
from fipo_megatron.actor.gated_silu import gated_silu
from fipo_megatron.actor.megatron_config import transformer_config
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.rotary import PackedRotaryEmbedding, RotationTable, inverse_frequencies
from fipo_megatron.actor.router_losses import replace_routers
from fipo_megatron.config import ActorConfig
from fipo_megatron.weights.architecture import Architecture


class SequenceParallelRMSNorm(torch.nn.Module):
    """RMSNorm under sequence parallelism: Megatron sums the gradient of its weight over the ranks of a sequence.

    Normalises in float32 and multiplies by the weight in the dtype of the input, like the models in transformers
    (``Qwen2RMSNorm``). Megatron-Core has no such norm without Transformer Engine or Apex: ``WrappedTorchNorm`` refuses
    sequence parallelism.

    Args:
        config: Configuration with the dtype of the weight and whether sequence parallelism is on.
        hidden_size: Width of the last dimension.
        eps: Constant added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - Megatron's own attribute

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises ``[..., hidden_size]``; returns the same shape and dtype."""
        wide = hidden.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(hidden.dtype)


class HiddenStateGPTModel(GPTModel):  # type: ignore[misc]  # Megatron has no types
    """GPTModel whose last stage returns hidden states instead of logits.

    Log-probs are computed from hidden states in chunks (:mod:`.log_probs`), so the logits of a whole micro-batch never
    exist. Megatron still owns ``output_layer``: it initialises, ties, shards and checkpoints its weight and, under
    pipeline parallelism, sums its gradient with that of the embedding. Only its forward pass is not used.

    With the layers of torch, Megatron applies no rotary embedding (``position_embedding_type`` is ``none``). The
    rotation of the micro-batch is computed here, once for all layers, and :class:`PackedCoreAttention` applies it.

    Args:
        config: Configuration of the model.
        frequencies: Inverse frequencies, ``[head_dim / 2]`` float32 (:func:`.rotary.inverse_frequencies`).
        true_vocab_size: Size of the vocabulary without padding; later rows of the output weight belong to no token.
    """

    def __init__(self, config: TransformerConfig, *, frequencies: Tensor, true_vocab_size: int, **kwargs: Any) -> None:
        rotates = config.transformer_impl == "local" and not config.apply_rope_fusion
        super().__init__(config=config, position_embedding_type="none" if rotates else "rope", **kwargs)
        self.rotations: RotationTable | None = None
        if rotates:
            self.rotations = RotationTable(frequencies, config.params_dtype)
        else:
            self.rotary_pos_emb = PackedRotaryEmbedding(frequencies)
        self.true_vocab_size = true_vocab_size

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes hidden states of a packed micro-batch.

        Args:
            input_ids: ``[1, T]`` int64.
            position_ids: Positions of the tokens in their sequences, ``[1, T]`` int64; of this rank's tokens under
                context parallelism.
            attention_mask: None.
            packed_seq_params: Boundaries of the sequences.
            kwargs: Other arguments of ``GPTModel.forward``.

        Returns:
            See :meth:`_postprocess`.

        Raises:
            ValueError: the sequences are not packed.
        """
        if self.rotations is not None:
            if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
                raise ValueError("HiddenStateGPTModel: sequences must be packed (qkv_format 'thd')")
            # Chunks share the parameters of a micro-batch. Each has a copy, which its recomputation reads as well.
            packed_seq_params = copy.copy(packed_seq_params)
            packed_seq_params.rotation = self.rotations.rotation(position_ids[0], packed_seq_params.max_seqlen_q)
        hidden: Tensor = super().forward(
            input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params, **kwargs
        )
        return hidden

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Returns ``[T, 1, hidden]``, after the final norm on the last stage; T is split under sequence parallelism."""
        return hidden_states

    def output_weight(self) -> Tensor:
        """Returns this rank's part of the output weight, ``[padded vocabulary / tensor_parallel, hidden]``.

        Raises:
            RuntimeError: this is not the last pipeline stage.
        """
        if not self.post_process:
            raise RuntimeError("output_weight: only the last pipeline stage has it")
        weight: Tensor = self.shared_embedding_or_output_weight() if self._tied else self.output_layer.weight
        return weight

    @property
    def _tied(self) -> bool:
        return bool(self.share_embeddings_and_output_weights)


def build_model(architecture: Architecture, actor: ActorConfig, layout: RankLayout) -> list[HiddenStateGPTModel]:
    """Builds this rank's chunks of the model, randomly initialised, on its device and in ``actor.dtype``.

    A chunk is called with ``(input_ids [1, T], position_ids [1, T], None, packed_seq_params=...)``. The process groups
    of the layout must exist (:func:`.parallel.initialize`). All chunks share one ``config``.

    Returns:
        ``virtual_pipeline`` chunks, in the order of Megatron's interleaved schedule.

    Raises:
        ValueError: see :func:`.megatron_config.check`; nothing has been built.
    """
    config = transformer_config(architecture, actor)
    stages = range(layout.virtual_size) if layout.virtual_size > 1 else (None,)
    return [_build_chunk(architecture, actor, config, layout, stage) for stage in stages]


def _build_chunk(
    architecture: Architecture, actor: ActorConfig, config: TransformerConfig, layout: RankLayout, stage: int | None
) -> HiddenStateGPTModel:
    chunk = HiddenStateGPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, stage),
        vocab_size=architecture.padded_vocab(actor.vocab_multiple * layout.tensor_size),
        max_sequence_length=architecture.max_positions,
        pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=architecture.tied,
        vp_stage=stage,
        frequencies=inverse_frequencies(architecture.rope, architecture.head_dim).to(layout.device),
        true_vocab_size=architecture.vocab,
    )
    replace_routers(chunk)
    if config.transformer_impl == "local" and config.use_te_activation_func:
        for module in chunk.modules():
            if isinstance(module, MLP):  # of dense layers and of experts
                module.activation_func = gated_silu
    return chunk


def _block_spec(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """Returns the specification of one chunk's layers, dense or mixtures according to ``moe_layer_freq``."""
    fused = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=fused, normalization=config.normalization, vp_stage=stage
    )
    if fused:
        return block
    block.layer_norm = SequenceParallelRMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
        # A specification in megatron-core 0.16, a functools.partial in 0.19.
        if (getattr(parts.mlp, "module", None) or getattr(parts.mlp, "func", None)) is MoELayer:
            # Checkpoints use the names of Transformer Engine's layers, which fuse this norm in dense layers only.
            parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)  # layers share one specification
        attention = parts.self_attention.submodules
        attention.core_attention = PackedCoreAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    return block


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
