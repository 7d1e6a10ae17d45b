"""What can be configured: typed dataclasses, one per room."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fipo_megatron.algorithm.advantages import Baseline
from fipo_megatron.algorithm.policy_loss_config import PolicyLossConfig
from fipo_megatron.config.checks import find_conflicts

_STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]

IMPORTANCE_CAP = 2.0
"""``algorithm.importance_cap`` where ``rollout.max_staleness`` > 0 and it is not given."""


@dataclass(config=_STRICT, frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
        path: Directory of a Hugging Face model: config.json, tokenizer and safetensors.
    """

    path: str = ""


@dataclass(config=_STRICT, frozen=True)
class AlgorithmConfig(PolicyLossConfig):
    """The loss (see :class:`.algorithm.policy_loss_config.PolicyLossConfig`) and the advantages that enter it.

    Attributes:
        advantage_baseline: What a response's reward is compared with.
        advantage_epsilon: Added to the standard deviation of a group.
        dynamic_sampling: Keep only groups whose responses are neither all right nor all wrong (DAPO).
        mask_truncated: Do not learn from responses that were cut off at the length limit.
        allow_inert: Accept FIPO with one update per rollout step, where every weight is exactly 1.
    """

    advantage_baseline: Baseline = "group_normalised"
    advantage_epsilon: NotNegative = 1e-6
    dynamic_sampling: bool = True
    mask_truncated: bool = False
    allow_inert: bool = False


@dataclass(config=_STRICT, frozen=True)
class DataConfig:
    """Prompts.

    Attributes:
        files: Training prompts: parquet in the schema of DAPO-Math-17k, or jsonl with ``prompt`` and ``answer``; for
            ``algorithm.kind = sft`` with ``prompt`` and ``response``.
        max_prompt_tokens: Longer prompts are left out.
        epochs: How often each prompt is used at most; null: as often as there are steps.
        chat_template: ``tokenizer``: that of the model's tokenizer; ``none``: what the messages say, one below the
            other.
        shuffle: Give the prompts of each epoch in an order of its own; else in that of the files.
    """

    files: tuple[str, ...] = ()
    max_prompt_tokens: Positive = 2048
    epochs: Positive | None = None
    chat_template: Literal["tokenizer", "none"] = "tokenizer"
    shuffle: bool = True


@dataclass(config=_STRICT, frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: Learning rate after the warm-up.
        min_lr: Learning rate at the end of the decay, and after it.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: What follows the warm-up.
        decay_steps: The optimizer step at which the decay ends, warm-up included; of no effect with ``constant``.
        weight_decay: Not applied to biases and norms.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_eps: Added to the root of the second moment.
        clip_grad: Global gradient norm to clip at; 0: no clipping.
    """

    lr: NotNegative = 1e-6
    min_lr: NotNegative = 0.0
    warmup_steps: Count = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: Count = 0
    weight_decay: NotNegative = 0.1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    clip_grad: NotNegative = 1.0


@dataclass(config=_STRICT, frozen=True)
class ParallelConfig:
    """How the actor is spread over its ranks; what is left over is data parallelism.

    Attributes:
        tensor_parallel: Ranks that share every weight matrix.
        pipeline_parallel: Stages that share the layers.
        virtual_pipeline: Chunks of layers per stage (the interleaved schedule); 1: off.
        context_parallel: Ranks that share every sequence.
        expert_parallel: Ranks that share the experts of a mixture of experts.
        expert_tensor_parallel: Ranks that share every expert's matrices; null: 1 with ``expert_parallel``, else
            ``tensor_parallel``.
        sequence_parallel: Share the activations between the matrices over the tensor-parallel ranks too.
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
        """``expert_tensor_parallel``, or what null stands for."""
        return self.expert_tensor_parallel or (1 if self.expert_parallel > 1 else self.tensor_parallel)


@dataclass(config=_STRICT, frozen=True)
class ActorConfig:
    """The policy and its updates.

    Attributes:
        prompts_per_mini_batch: Prompts (groups) per optimizer step.
        token_budget: The most tokens in a packed micro-batch, over all its context-parallel ranks; padding included.
        log_prob_chunk_tokens: Count whose logits exist at the same time.
        max_noise_shift: Bound of |d| between two passes at equal weights, checked at start-up.
        max_noise_future_kl: Bound of |F| between two passes at equal weights.
        optimizer: See :class:`OptimizerConfig`.
        parallel: See :class:`ParallelConfig`.
        dtype: Of the weights in the forward pass; bfloat16 trains float32 main parameters.
        distributed_optimizer: Share the optimizer's state over the data- and context-parallel ranks.
        overlap_grad_reduce: Reduce gradients while the backward pass runs.
        recompute: Activations that the backward pass computes again: of core attention, or of whole layers.
        fp8: Matrix products in FP8: forward and backward in E4M3, or the backward in E5M2 (hybrid).
        fp8_recipe: What shares a scale: 128-wide blocks, one tensor, or one tensor with a scale from earlier steps.
        fp8_bf16_first_last: Layers that stay in bfloat16 at each end of the model.
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


@dataclass(config=_STRICT, frozen=True)
class ServersConfig:
    """SGLang servers.

    Attributes:
        urls: Of servers that run already; none: they are started here.
        router: A URL in front of them that takes ``/generate``; control calls still go to each of ``urls``.
        per_host: How many are started on each host of the actor, where ``urls`` is empty.
        python: Of SGLang's environment (``make sglang-env``).
        api_key_variable: The environment variable that holds the servers' key; the key itself is in no file.
        concurrency: Requests in flight per server and leader.
        progress_seconds: A server with requests in flight that samples nothing for so long is lost.
        patience_seconds: With no server left, wait so long for one to come back.
        ready_seconds: A server that is started must serve within.
        restarts: How often each server may be started again.
        colocated: Servers and actor share their GPUs, and take turns.
        sync: How weights get there: a directory that both see, in the request itself, or by broadcast.
        bucket_mib: Of weights sent at a time.
        probe_tokens: Sampled after each update of the weights and compared with the actor; 0: no comparison.
        max_probe_shift: The largest difference of log-probs in that comparison.
    """

    urls: tuple[str, ...] = ()
    router: str | None = None
    per_host: Positive = 1
    python: str = ".venv-sglang/bin/python"
    api_key_variable: str = "FIPO_SGLANG_API_KEY"
    concurrency: Positive = 256
    progress_seconds: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 300.0
    patience_seconds: Seconds = 600.0
    ready_seconds: Seconds = 600.0
    restarts: Count = 3
    colocated: bool = False
    sync: Literal["disk", "tensor", "distributed"] = "distributed"
    bucket_mib: Positive = 256
    probe_tokens: Count = 32
    max_probe_shift: NotNegative = 0.5


@dataclass(config=_STRICT, frozen=True)
class RolloutConfig:
    """Sampling of responses.

    Attributes:
        prompts_per_step: Prompts whose groups are kept per rollout step.
        samples_per_prompt: G, responses per prompt.
        max_response_tokens: Generation stops here.
        temperature: Of the sampling; log-probs are after it.
        top_p: Nucleus; 1: off.
        max_generation_batches: Dynamic sampling gives up after this many batches of prompts.
        on_exhausted: What happens then: an error, or a smaller step.
        over_sampling: So many times the missing groups are sampled at a time; above 1 the slowest are aborted.
        max_staleness: How many versions older than the current one a token's weights may be. Above 0, aborted
            responses go on in the next step, and ``algorithm.importance_cap`` is 2 unless it is given.
        overlap: Sample the next step while this one is learned from: its tokens are then one version old, which
            counts for ``max_staleness``. Engine and actor need devices of their own.
        silence_seconds: A rank that is waited for and has shown no sign for so long has failed.
        engine: SGLang servers, or transformers in the trainer's own processes (no GPU needed).
        embedded_slots: Requests that the embedded engine samples at a time: a multiple of 16.
        servers: See :class:`ServersConfig`.
        sglang: Arguments of the servers by the names of SGLang's ``ServerArgs``.
    """

    prompts_per_step: Positive = 512
    samples_per_prompt: Positive = 16
    max_response_tokens: Positive = 20480
    temperature: Temperature = 1.0
    top_p: Fraction = 1.0
    max_generation_batches: Positive = 10
    on_exhausted: Literal["error", "smaller"] = "error"
    over_sampling: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    max_staleness: Count = 0
    overlap: bool = False
    silence_seconds: Seconds = 600.0
    engine: Literal["sglang", "embedded"] = "sglang"
    embedded_slots: Annotated[int, Field(ge=16, multiple_of=16)] = 32
    servers: ServersConfig = field(default_factory=ServersConfig)
    sglang: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_STRICT, frozen=True)
class RewardConfig:
    """What a response is worth: +1 or −1 from the verifier, and a length penalty.

    Attributes:
        verifier: How answers are checked: ``math``, ``exact``, ``python:MODULE.FUNCTION`` or a URL.
        verifier_processes: Answers that are checked at a time.
        verifier_seconds: CPU time for one answer; one that takes longer is wrong.
        verifier_memory_mib: Of the process that checks an answer; one that needs more is wrong.
        overlong_buffer_tokens: The penalty grows over this many tokens before the length limit; 0: no penalty.
        overlong_penalty: The penalty at the limit.
        truncated_is_wrong: A response that was cut off at the length limit is wrong, whatever it says.
    """

    verifier: str = "math"
    verifier_processes: Positive = 4
    verifier_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    verifier_memory_mib: Positive = 2048
    overlong_buffer_tokens: Count = 4096
    overlong_penalty: NotNegative = 1.0
    truncated_is_wrong: bool = False


@dataclass(config=_STRICT, frozen=True)
class EvaluationConfig:
    """Evaluation, during training (``run.evaluate_every``) and alone (``python -m fipo_megatron.evaluate``).

    Attributes:
        files: Problems, in the formats of ``data.files``; statistics are of each ``data_source``, or each file.
        samples_per_prompt: k of avg@k, cons@k and pass@k.
        temperature: Of the sampling.
        top_p: Nucleus; 1: off.
        checkpoint: Alone: a Megatron checkpoint (torch_dist) to evaluate; null: the model in ``model.path``.
        name: Alone: results go to ``evaluation-NAME`` in ``run.output``; null: the last part of the path of what is
            evaluated.
    """

    files: tuple[str, ...] = ()
    samples_per_prompt: Positive = 32
    temperature: Temperature = 1.0
    top_p: Fraction = 0.7
    checkpoint: str | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None


@dataclass(config=_STRICT, frozen=True)
class ObserveConfig:
    """What a run shows of itself, beside ``metrics.jsonl``, ``evaluation.jsonl`` and ``timing.jsonl``.

    Attributes:
        tensorboard: Write event files to ``tensorboard/`` in the output.
        trackers: Services that get the same numbers; their packages must be installed.
        project: Of the run in these services.
        texts: Responses per step that TensorBoard and the services show, right and wrong ones.
        trajectories: Responses per step that are kept in ``trajectories/``, right and wrong ones; 0: none.
        trajectories_every: Steps between two that keep some.
        trajectory_tokens: Keep log-probs, Future-KL, weight and entropy of each of their tokens, too.
        trajectory_file_mib: A new file is begun when one has so much.
        trajectory_mib: Of all these files together; then the oldest one is removed.
        plain_console: Plain lines on a terminal, too.
    """

    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "swanlab"], ...] = ()
    project: str = "fipo_megatron"
    texts: Count = 4
    trajectories: Count = 8
    trajectories_every: Positive = 1
    trajectory_tokens: bool = False
    trajectory_file_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    trajectory_mib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 256.0
    plain_console: bool = False


@dataclass(config=_STRICT, frozen=True)
class HealthConfig:
    """The alarm for collapse: many tokens clipped from below and a rising policy KL, while length or accuracy falls.

    It is raised where medians of ``window`` steps are at the bounds of both and at that of the length or the accuracy,
    or where the policy KL alone is at ``policy_kl_limit``. One bad step is none.

    Attributes:
        action: What follows: nothing, a warning, a checkpoint and the end of the run, or a return to a checkpoint from
            before; ``off``: the alarm is not looked at.
        window: Steps whose median is taken.
        low_clip: Tokens with A < 0 clipped at 1 − ε_low, of all tokens.
        policy_kl: Mean of −d over the updates of a step, by absolute value.
        length_ratio: Mean response length, of its best so far.
        accuracy_ratio: Accuracy of the responses that are learned from, of its best so far.
        policy_kl_limit: Policy KL that is an alarm by itself.
        max_roll_backs: Then the run is ended.
        roll_back_lr: The learning rate is multiplied by this at each return.
    """

    action: Literal["off", "warn", "stop", "roll_back"] = "stop"
    window: Positive = 3
    low_clip: NotNegative = 0.02
    policy_kl: NotNegative = 0.01
    length_ratio: Fraction = 0.75
    accuracy_ratio: Fraction = 0.6
    policy_kl_limit: NotNegative = 0.1
    max_roll_backs: Positive = 2
    roll_back_lr: Fraction = 0.5


@dataclass(config=_STRICT, frozen=True)
class RunConfig:
    """How long the run is, and what it writes.

    Attributes:
        steps: Rollout steps, each with ``updates_per_step`` optimizer steps.
        output: Directory of all that the run writes.
        evaluate_every: Steps between two evaluations; 0: none.
        noise_floor_every: Steps between two that report what two passes at equal weights differ by; 0: none does. It
            is checked in the first step of every process that learns.
        record_rollouts: Keep the sampled responses of every step, for ``replay``.
        replay: A directory of recorded responses to train on instead of sampling.
        rollout_only: Sample and score, but do not learn.
    """

    steps: Positive = 100
    output: str = "output"
    evaluate_every: Count = 0
    noise_floor_every: Count = 50
    record_rollouts: bool = False
    replay: str | None = None
    rollout_only: bool = False


@dataclass(config=_STRICT, frozen=True)
class CheckpointConfig:
    """Checkpoints, resuming from them, and exports as Hugging Face models.

    Attributes:
        save_every: Steps between two checkpoints; 0 saves only after the last step.
        async_save: Write checkpoints in the background, from a copy in host memory.
        keep_last: Number of newest checkpoints to keep. Up to two older ones stay for the collapse alarm to roll back
            to.
        keep_best: Also keep the checkpoint with the best evaluation accuracy.
        optimizer_sharding: Format of the distributed optimizer's state. ``fully_reshardable`` loads under any layout
            but is gathered on the hosts before it is written; ``dp_reshardable`` is written as it is, and tensor- and
            pipeline-parallel sizes must then stay the same.
        export_every: Steps between two exports as a Hugging Face model; 0 exports only after the last step.
        resume: ``auto`` resumes from the newest checkpoint in ``run.output`` if there is one; ``never`` requires a new
            or empty ``run.output``.
    """

    save_every: Count = 20
    async_save: bool = True
    keep_last: Positive = 2
    keep_best: bool = True
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    export_every: Count = 0
    resume: Literal["auto", "never"] = "auto"


@dataclass(config=_STRICT, frozen=True)
class SftConfig:
    """Supervised fine-tuning (``algorithm.kind = sft``).

    Attributes:
        examples_per_step: Examples per step; a step has ``examples_per_step / actor.prompts_per_mini_batch`` optimizer
            steps.
    """

    examples_per_step: Positive = 512


@dataclass(config=_STRICT, frozen=True)
class Config:
    """A run.

    Attributes:
        run: See :class:`RunConfig`.
        model: See :class:`ModelConfig`.
        algorithm: See :class:`AlgorithmConfig`.
        data: See :class:`DataConfig`.
        actor: See :class:`ActorConfig`.
        rollout: See :class:`RolloutConfig`.
        reward: See :class:`RewardConfig`.
        evaluation: See :class:`EvaluationConfig`.
        observe: See :class:`ObserveConfig`.
        health: See :class:`HealthConfig`.
        checkpoint: See :class:`CheckpointConfig`.
        sft: See :class:`SftConfig`.
        seed: Of everything random in the run.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    seed: Count = 0

    def __post_init__(self) -> None:
        """Raises ValueError for every combination that cannot work, all in one message."""
        if problems := list(find_conflicts(self)):
            raise ValueError("\n".join(problems))

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per step of the run."""
        return -(-self.groups_per_step // self.actor.prompts_per_mini_batch)

    @property
    def groups_per_step(self) -> int:
        """Groups of responses per step; with ``algorithm.kind = sft``, examples."""
        return self.sft.examples_per_step if self.algorithm.kind == "sft" else self.rollout.prompts_per_step
