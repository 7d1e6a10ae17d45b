"""What can be configured: typed dataclasses, one per room, and what cannot go together."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fipo_megatron.algorithm.advantages import Baseline
from fipo_megatron.algorithm.policy_loss import KIND_DEFAULTS, PolicyLossConfig

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
    """The loss (see :class:`.algorithm.policy_loss.PolicyLossConfig`) and the advantages that enter it.

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
    progress_seconds: Seconds = 300.0
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
class RunConfig:
    """How long the run is, and what it writes.

    Attributes:
        steps: Rollout steps, each with ``updates_per_step`` optimizer steps.
        output: Directory of all that the run writes.
        save_every: Steps between two checkpoints; 0: at the end alone.
        async_save: Write checkpoints while the run goes on, from a copy on the host.
        keep_last: Checkpoints to keep, the newest.
        keep_best: Keep the one with the best evaluation, too.
        optimizer_sharding: Of the distributed optimizer in checkpoints: ``fully_reshardable`` can be loaded under any
            layout, but is gathered on the hosts first; ``dp_reshardable`` is written as it is, and tensor- and
            pipeline-parallel sizes must then stay the same.
        export_every: Steps between two exports as a Hugging Face model; 0: at the end alone.
        resume: ``auto``: from the newest checkpoint in ``output``, if there is one; ``never``: ``output`` must be new.
        evaluate_every: Steps between two evaluations; 0: none.
        record_rollouts: Keep the sampled responses of every step, for ``replay``.
        replay: A directory of recorded responses to train on instead of sampling.
        rollout_only: Sample and score, but do not learn.
    """

    steps: Positive = 100
    output: str = "output"
    save_every: Count = 20
    async_save: bool = True
    keep_last: Positive = 2
    keep_best: bool = True
    optimizer_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    export_every: Count = 0
    resume: Literal["auto", "never"] = "auto"
    evaluate_every: Count = 0
    record_rollouts: bool = False
    replay: str | None = None
    rollout_only: bool = False


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
    seed: Count = 0

    def __post_init__(self) -> None:
        """Raises ValueError for every combination that cannot work, all in one message."""
        if problems := list(_impossible(self)):
            raise ValueError("\n".join(problems))

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per rollout step."""
        return -(-self.rollout.prompts_per_step // self.actor.prompts_per_mini_batch)


def _impossible(config: Config) -> list[str]:
    algorithm, actor, rollout, reward = config.algorithm, config.actor, config.rollout, config.reward
    problems = []
    if actor.prompts_per_mini_batch > rollout.prompts_per_step:
        problems.append(
            f"actor.prompts_per_mini_batch = {actor.prompts_per_mini_batch}: must be at most "
            f"rollout.prompts_per_step = {rollout.prompts_per_step}"
        )
    elif algorithm.kind == "fipo" and config.updates_per_step == 1 and not algorithm.allow_inert:
        problems.append(
            f"actor.prompts_per_mini_batch = {actor.prompts_per_mini_batch}: one update per rollout step makes FIPO "
            "inert (π_θ = π_old, so every weight is 1); use at most half of rollout.prompts_per_step = "
            f"{rollout.prompts_per_step}, algorithm.kind=dapo, or algorithm.allow_inert=true"
        )
    if rollout.samples_per_prompt < 2 and algorithm.kind != "sft":
        problems.append(
            f"rollout.samples_per_prompt = {rollout.samples_per_prompt}: must be at least 2, an advantage compares the "
            "responses to one prompt"
        )
    if reward.overlong_buffer_tokens > rollout.max_response_tokens:
        problems.append(
            f"reward.overlong_buffer_tokens = {reward.overlong_buffer_tokens}: must be at most "
            f"rollout.max_response_tokens = {rollout.max_response_tokens}"
        )
    parallel = actor.parallel
    multiple = 2 * parallel.context_parallel if parallel.context_parallel > 1 else 1
    multiple *= parallel.tensor_parallel if parallel.sequence_parallel else 1
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if (padded := -(-longest // multiple) * multiple) > actor.token_budget:
        problems.append(
            f"actor.token_budget = {actor.token_budget}: must be at least data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}, padded for actor.parallel to a multiple of {multiple}: {padded}"
        )
    return problems + _impossible_actor(actor) + _impossible_servers(rollout) + _impossible_run(config)


def _impossible_run(config: Config) -> list[str]:
    run, problems = config.run, []
    if run.replay and run.rollout_only:
        problems.append(f"run.replay = {run.replay}: cannot go with run.rollout_only, nothing would be done")
    if run.evaluate_every and not config.evaluation.files:
        problems.append(f"run.evaluate_every = {run.evaluate_every}: needs evaluation.files")
    if run.evaluate_every and (run.replay or config.algorithm.kind == "sft"):
        problems.append(
            f"run.evaluate_every = {run.evaluate_every}: must be 0 with run.replay or algorithm.kind = sft, which have "
            "no engine"
        )
    return problems


def _impossible_servers(rollout: RolloutConfig) -> list[str]:
    servers, problems = rollout.servers, []
    if servers.router and not servers.urls:
        problems.append(
            f"rollout.servers.router = {servers.router}: needs rollout.servers.urls, those of every server behind it"
        )
    if rollout.overlap and not rollout.max_staleness:
        problems.append("rollout.overlap = True: needs rollout.max_staleness of at least 1, tokens are one version old")
    if rollout.overlap and servers.colocated:
        problems.append("rollout.overlap = True: must be false with rollout.servers.colocated, they take turns")
    if servers.colocated and servers.urls:
        problems.append("rollout.servers.colocated = True: must be false with rollout.servers.urls")
    if servers.colocated and rollout.engine == "embedded":
        problems.append("rollout.servers.colocated = True: must be false with rollout.engine = embedded")
    if servers.colocated and servers.sync == "distributed":
        problems.append(
            "rollout.servers.sync = distributed: must be tensor or disk with rollout.servers.colocated, NCCL allows "
            "one rank per GPU"
        )
    problems += [
        f"rollout.servers.{name} = {url}: must begin with http:// or https://"
        for name, urls in (("urls", servers.urls), ("router", (servers.router,) if servers.router else ()))
        for url in urls
        if not url.startswith(("http://", "https://"))
    ]
    return problems


def _impossible_actor(actor: ActorConfig) -> list[str]:
    parallel, optimizer, problems = actor.parallel, actor.optimizer, []
    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        problems.append(
            "actor.parallel.sequence_parallel = True: needs actor.parallel.tensor_parallel of at least 2, it shares "
            "activations over those ranks"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline_parallel == 1:
        problems.append(
            f"actor.parallel.virtual_pipeline = {parallel.virtual_pipeline}: must be 1 without "
            "actor.parallel.pipeline_parallel"
        )
    if optimizer.schedule != "constant" and optimizer.decay_steps <= optimizer.warmup_steps:
        problems.append(
            f"actor.optimizer.decay_steps = {optimizer.decay_steps}: must be more than actor.optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} with actor.optimizer.schedule = {optimizer.schedule}"
        )
    if optimizer.min_lr > optimizer.lr:
        problems.append(
            f"actor.optimizer.min_lr = {optimizer.min_lr:g}: must be at most actor.optimizer.lr = {optimizer.lr:g}"
        )
    if actor.fp8 != "off" and actor.dtype != "bfloat16":
        problems.append(f"actor.dtype = {actor.dtype}: must be bfloat16 with actor.fp8 = {actor.fp8}")
    if actor.fp8 != "off" and actor.fp8_recipe == "delayed" and actor.fp8_bf16_first_last:
        problems.append(
            f"actor.fp8_bf16_first_last = {actor.fp8_bf16_first_last}: must be 0 with actor.fp8_recipe = delayed; "
            "blockwise and tensorwise can leave layers in bfloat16"
        )
    return problems


def notices(config: Config) -> list[str]:
    """What is valid but worth knowing at start-up, one sentence each."""
    a = config.algorithm
    found = []
    if a.kind == "fipo" and a.safety_threshold >= a.dual_clip:
        found.append(
            f"algorithm.safety_threshold = {a.safety_threshold:g} has no effect on the gradient: it is at least "
            f"dual_clip = {a.dual_clip:g}, and dual-clipped tokens have none"
        )
    if a.kind == "fipo" and a.weight_clip is not None and not a.weight_clip[0] <= 1 <= a.weight_clip[1]:
        found.append(
            f"algorithm.weight_clip = {list(a.weight_clip)} does not contain 1: it rescales every token, also where "
            "the policy has not moved"
        )
    found += [
        f"algorithm.{key} = {getattr(a, key)}: {a.kind} has {default}"
        for key, default in KIND_DEFAULTS[a.kind].items()
        if getattr(a, key) != default
    ]
    if a.kl_coef and a.kl_estimator == "k1":
        found.append("algorithm.kl_estimator = k1 has zero expected gradient as a loss term; k2 or k3 pull")
    if config.rollout.max_staleness and a.importance_cap is None:
        found.append(
            f"rollout.max_staleness = {config.rollout.max_staleness} without algorithm.importance_cap: tokens of older "
            "weights are learned from as if the current ones had sampled them"
        )
    left_over = config.rollout.prompts_per_step % config.actor.prompts_per_mini_batch
    if left_over:
        found.append(
            f"actor.prompts_per_mini_batch = {config.actor.prompts_per_mini_batch} does not divide "
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step}: the last update sees {left_over} prompts"
        )
    return found
