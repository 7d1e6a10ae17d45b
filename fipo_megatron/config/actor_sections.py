"""The sections about the policy and its updates: ``model``, ``algorithm``, ``actor`` and ``sft``."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fipo_megatron.algorithm.policy_loss_config import Baseline, PolicyLossConfig
from fipo_megatron.config.field_types import STRICT, Count, NotNegative, Positive, PositiveNumber

IMPORTANCE_CAP = 2.0
"""Default of ``algorithm.importance_cap`` if ``rollout.max_staleness`` > 0."""


@dataclass(config=STRICT, frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
        path: Directory of a Hugging Face model: config.json, tokenizer and safetensors.
    """

    path: str = ""


@dataclass(config=STRICT, frozen=True)
class AlgorithmConfig(PolicyLossConfig):
    """The loss (see :class:`.algorithm.policy_loss_config.PolicyLossConfig`) and the advantages that enter it.

    Attributes:
        advantage_baseline: Baseline that is subtracted from a response's reward.
        advantage_epsilon: Constant added to the standard deviation of a group's rewards.
        dynamic_sampling: Drop groups whose responses are all right or all wrong (DAPO).
        mask_truncated: Leave responses that were cut off at the length limit out of the loss.
        allow_inert: Accept FIPO with one update per rollout step, where every weight is exactly 1.
    """

    advantage_baseline: Baseline = "group_normalised"
    advantage_epsilon: NotNegative = 1e-6
    dynamic_sampling: bool = True
    mask_truncated: bool = False
    allow_inert: bool = False


@dataclass(config=STRICT, frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Learning rate after the warm-up.
        min_lr: Learning rate at the end of the decay and after it.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: Shape of the learning rate after the warm-up.
        decay_steps: Optimizer step at which the decay ends, warm-up included. Ignored with ``constant``.
        weight_decay: Decoupled weight decay; not applied to biases and norms.
        adam_beta1: Decay rate of the first moment.
        adam_beta2: Decay rate of the second moment.
        adam_eps: Constant added to the square root of the second moment.
        clip_grad: Global gradient norm to clip at; 0 disables clipping.
    """

    lr: NotNegative = 1e-6
    min_lr: NotNegative = 0.0
    warmup_steps: Count = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: Count = 0
    weight_decay: NotNegative = 0.1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_eps: PositiveNumber = 1e-8
    clip_grad: NotNegative = 1.0


@dataclass(config=STRICT, frozen=True)
class ParallelConfig:
    """The actor's parallel layout. The remaining factor of the world size is the data-parallel size.

    Attributes:
        tensor_parallel: Tensor-parallel size: ranks that split every weight matrix.
        pipeline_parallel: Pipeline-parallel size: stages that split the layers.
        virtual_pipeline: Model chunks per stage (interleaved schedule); 1 disables interleaving.
        context_parallel: Context-parallel size: ranks that split every sequence.
        expert_parallel: Expert-parallel size: ranks that split the experts of a mixture-of-experts model.
        expert_tensor_parallel: Tensor-parallel size of the experts; null: 1 if ``expert_parallel`` > 1, else
            ``tensor_parallel``.
        sequence_parallel: Split the activations outside the tensor-parallel matrices over those ranks as well.
    """

    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    virtual_pipeline: Positive = 1
    context_parallel: Positive = 1
    expert_parallel: Positive = 1
    expert_tensor_parallel: Positive | None = None
    sequence_parallel: bool = False

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel size of the experts, with the default resolved."""
        return self.expert_tensor_parallel or (1 if self.expert_parallel > 1 else self.tensor_parallel)

    @property
    def data_ranks_in_lockstep(self) -> int:
        """Consecutive data-parallel ranks that share experts, and therefore wait for each other in every layer."""
        experts, replica = self.expert_parallel * self.expert_tensor_size, self.tensor_parallel * self.context_parallel
        return -(-experts // replica)


@dataclass(config=STRICT, frozen=True)
class ActorConfig:
    """The policy and its updates.

    Attributes:
        prompts_per_mini_batch: Prompts (groups) per optimizer step.
        token_budget: Maximum number of tokens in a packed micro-batch over all context-parallel ranks, padding
            included.
        log_prob_chunk_tokens: Tokens per chunk of the log-prob computation. Only one chunk's logits exist at a time.
        max_noise_shift: Upper bound of |d| between two passes at equal weights, checked in the first step of every
            process that trains.
        max_noise_future_kl: Upper bound of |F| between two passes at equal weights, checked in the same place.
        optimizer: The optimizer; a section of its own.
        parallel: The parallel layout; a section of its own.
        dtype: Dtype of the weights in the forward pass. bfloat16 trains float32 main parameters.
        distributed_optimizer: Shard the optimizer state over the data- and context-parallel ranks.
        overlap_grad_reduce: Reduce gradients while the backward pass runs.
        recompute: Activations that the backward pass recomputes: none, those inside the MLPs (``selective``), or those
            of whole layers (``full``).
        fp8: Matrix products in FP8: ``e4m3`` in forward and backward, or ``hybrid`` with E5M2 in backward.
        fp8_recipe: Granularity of the FP8 scales: 128-wide blocks, one tensor, or one tensor with a scale from earlier
            steps (``delayed``).
        fp8_bf16_first_last: Layers at each end of the model that stay in bfloat16.
        vocab_multiple: The vocabulary is padded to a multiple of this times ``tensor_parallel``.
        transformer: Fields of Megatron-Core's TransformerConfig by name.
        ddp: Fields of Megatron-Core's DistributedDataParallelConfig by name.
        megatron_optimizer: Fields of Megatron-Core's OptimizerConfig by name.
    """

    prompts_per_mini_batch: Positive = 64
    token_budget: Positive = 32768
    log_prob_chunk_tokens: Positive = 1024
    max_noise_shift: NotNegative = 0.01
    max_noise_future_kl: NotNegative = 0.05
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    fp8_recipe: Literal["blockwise", "tensorwise", "delayed"] = "blockwise"
    fp8_bf16_first_last: Count = 0
    vocab_multiple: Positive = 1
    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    megatron_optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass(config=STRICT, frozen=True)
class SftConfig:
    """Supervised fine-tuning (``algorithm.kind = sft``).

    Attributes:
        examples_per_step: Examples per step; a step has ``examples_per_step / actor.prompts_per_mini_batch`` optimizer
            steps.
        max_skipped_updates: Updates skipped in a row, because a loss or gradient is not finite, after which the run
            ends with an error.
    """

    examples_per_step: Positive = 512
    max_skipped_updates: Positive = 5
