"""The sections about data, responses and rewards: ``data``, ``rollout``, ``reward``, ``evaluation`` and ``amplify``."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fipo_megatron.config.field_types import (
    LARGEST_NUMBER,
    STRICT,
    Count,
    Fraction,
    NotNegative,
    Number,
    Positive,
    PositiveNumber,
)


@dataclass(config=STRICT, frozen=True)
class DataConfig:
    """Training prompts.

    Attributes:
        files: Training prompts: parquet in the schema of DAPO-Math-17k, or jsonl with ``prompt`` and ``answer``; for
            ``algorithm.kind = sft`` with ``prompt`` and ``response``.
        max_prompt_tokens: Maximum prompt length; longer prompts are left out.
        epochs: Maximum number of epochs over the prompts; null: as many as the run needs.
        chat_template: ``tokenizer`` applies the chat template of the model's tokenizer; ``none`` joins the contents of
            the messages with line breaks.
        shuffle: Shuffle the prompts anew in each epoch; otherwise they keep the order of the files.
        deduplicate: Rows that are left out: those with the prompt and the answer of an earlier row (``rows``), those
            with its prompt, whatever their answer (``prompts``), or none (``none``). ``auto`` is ``rows``, and ``none``
            with ``algorithm.kind = sft``.
    """

    files: tuple[str, ...] = ()
    max_prompt_tokens: Positive = 2048
    epochs: Positive | None = None
    chat_template: Literal["tokenizer", "none"] = "tokenizer"
    shuffle: bool = True
    deduplicate: Literal["auto", "none", "rows", "prompts"] = "auto"


@dataclass(config=STRICT, frozen=True)
class ServersConfig:
    """SGLang servers.

    Attributes:
        urls: URLs of running servers; if empty, the run starts its own.
        router: URL of a router in front of the servers for ``/generate`` requests. Control requests still go to each
            of ``urls``.
        per_host: Servers to start on each host of the actor if ``urls`` is empty.
        python: Python interpreter of SGLang's environment (``make sglang-env``).
        environment: Environment variables of the servers that the run starts. Servers inherit only those variables of
            the trainer that docs/rollout.md lists. The run's files contain the values, so they must not be secret.
        interface: Network interface between the hosts, such as ``eth0``, or this host's IPv4 address on it: servers of
            several hosts listen there, and ``sync = distributed`` sends from there. null: the address to which the
            host's name resolves.
        api_key_variable: Environment variable that holds the servers' API key. The key itself is written to no file.
        concurrency: Requests in flight per server and leader.
        progress_seconds: Seconds without a new token after which a server with requests in flight counts as lost.
        patience_seconds: Seconds to wait for a lost server to return when none is left. Also the time-out of the
            weight broadcast with ``sync = distributed``.
        ready_seconds: Seconds within which a started server must accept requests.
        restarts: Maximum number of restarts of each server that the run has started; colocated servers are not
            restarted.
        colocated: Servers and actor share the same GPUs and use them in turns.
        sync: Transport of the weights to the servers: files in a directory that both sides see (``disk``), the request
            itself (``tensor``), or a broadcast (``distributed``).
        nccl_version: NCCL version of the servers in ``urls``, such as 2.30.7, with ``sync = distributed`` on GPUs. It
            must be the trainer's. Servers that the run starts are asked.
        bucket_mib: MiB of weights sent at a time.
        probe_tokens: Tokens of each of 8 responses that are sampled after each weight update to compare the servers'
            log-probs with the actor's; 0 disables the comparison.
        max_probe_mean_shift: Largest mean |difference of log-probs| that this comparison accepts, in nats.
        max_probe_quantile_shift: Largest 90 % quantile of |difference of log-probs| that this comparison accepts, in
            nats. Single tokens may differ more.
    """

    urls: tuple[str, ...] = ()
    router: str | None = None
    per_host: Positive = 1
    python: str = ".venv-sglang/bin/python"
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = field(default_factory=dict)
    interface: Annotated[str, Field(min_length=1)] | None = None
    api_key_variable: str = "FIPO_SGLANG_API_KEY"
    concurrency: Positive = 256
    progress_seconds: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 300.0
    patience_seconds: PositiveNumber = 600.0
    ready_seconds: PositiveNumber = 600.0
    restarts: Count = 3
    colocated: bool = False
    sync: Literal["disk", "tensor", "distributed"] = "distributed"
    nccl_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+")] | None = None
    bucket_mib: Positive = 256
    probe_tokens: Count = 32
    max_probe_mean_shift: NotNegative = 0.1
    max_probe_quantile_shift: NotNegative = 0.3


@dataclass(config=STRICT, frozen=True)
class RolloutConfig:
    """Sampling of responses.

    Attributes:
        prompts_per_step: Prompts whose groups are kept per rollout step.
        samples_per_prompt: Responses per prompt (G).
        max_response_tokens: Maximum response length.
        temperature: Sampling temperature. Log-probs are those of the tempered distribution.
        top_p: Cumulative probability of nucleus sampling; 1 disables it. Below 1, responses are not drawn from the
            policy that is trained, and ``allow_top_p`` must be set.
        allow_top_p: Accept ``top_p`` below 1. Behaviour log-probs are those before filtering, so neither the mismatch
            nor importance weights include the filter.
        max_generation_batches: Maximum number of prompt batches that dynamic sampling draws in a step.
        on_exhausted: Reaction to too few groups after ``max_generation_batches``: an error, or a smaller step.
        max_empty_steps: Steps in a row without any group after which ``on_exhausted = smaller`` is an error, too.
        over_sampling: Oversampling factor. Once enough groups have finished, the rest are aborted.
        max_staleness: Maximum age of a response's tokens in weight versions. Above 0, aborted responses continue in
            the next step, and ``algorithm.importance_cap`` defaults to 2.
        overlap: Sample the next step while this one is trained on. Its tokens are then one version old, which counts
            towards ``max_staleness``. Engine and actor need separate devices.
        silence_seconds: Seconds without a sign of life after which a rank counts as lost, which ends the run.
        engine: ``sglang`` uses SGLang servers; ``embedded`` runs transformers in the trainer's own processes and needs
            no GPU.
        embedded_slots: Most requests that the embedded engine samples at the same time. A slot that is not in use
            costs memory only.
        embedded_device: Device of the embedded engine: the CPU, or the GPU of its rank, beside the actor.
        servers: The SGLang servers; a section of its own.
        sglang: Arguments of the servers that the run starts, by the names of SGLang's ``ServerArgs``. ``base_gpu_id``
            is the first GPU of a host's servers. Its default is the first one after those of the trainer's ranks, or 0
            for colocated servers.
    """

    prompts_per_step: Positive = 512
    samples_per_prompt: Positive = 16
    max_response_tokens: Positive = 20480
    temperature: PositiveNumber = 1.0
    top_p: Fraction = 1.0
    allow_top_p: bool = False
    max_generation_batches: Positive = 10
    on_exhausted: Literal["error", "smaller"] = "error"
    max_empty_steps: Positive = 10
    over_sampling: Annotated[float, Field(ge=1, le=1000)] = 1.0
    max_staleness: Count = 0
    overlap: bool = False
    silence_seconds: Annotated[float, Field(ge=5, le=LARGEST_NUMBER, allow_inf_nan=False)] = 600.0
    engine: Literal["sglang", "embedded"] = "sglang"
    embedded_slots: Annotated[int, Field(ge=16, le=2**16, multiple_of=16)] = 32
    embedded_device: Literal["cpu", "cuda"] = "cpu"
    servers: ServersConfig = field(default_factory=ServersConfig)
    sglang: dict[str, Any] = field(default_factory=dict)


@dataclass(config=STRICT, frozen=True)
class RewardConfig:
    """The reward of a response: +1 or −1 from the verifier, and a length penalty.

    Attributes:
        verifier: Verifier of the answers: ``math``, ``exact``, ``python:MODULE.FUNCTION`` or a URL.
        thinking_end: End tags of thinking. ``math`` and ``exact`` read only what follows the last of them.
        verifier_processes: Answers checked at the same time.
        verifier_seconds: CPU seconds for one answer; an answer that takes longer counts as wrong. More than twice this
            plus one second of wall time is a failed check. For a URL: seconds of one request.
        verifier_memory_mib: Memory limit of a verifier process in MiB, at least 256; a check that needs more
            has failed.
        on_failure: Response whose check failed (docs/rewards.md): ``mask`` leaves it out of the group's advantages and
            of the loss, ``wrong`` learns from it as from a wrong answer. An evaluation always leaves it out.
        max_failure_fraction: Fraction of failed checks of a step or an evaluation beyond which it ends with the first
            error text; 1: only if all checks fail.
        overlong_buffer_tokens: Tokens before the length limit over which the penalty grows; 0 disables the penalty.
        overlong_penalty: Penalty at the length limit.
        truncated_is_wrong: Count every response that was cut off at the length limit as wrong.
    """

    verifier: str = "math"
    thinking_end: tuple[Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")], ...] = ("</think>",)
    verifier_processes: Positive = 4
    verifier_seconds: PositiveNumber = 5.0
    verifier_memory_mib: Annotated[int, Field(ge=256, le=2**31 - 1)] = 2048
    on_failure: Literal["mask", "wrong"] = "mask"
    max_failure_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    overlong_buffer_tokens: Count = 4096
    overlong_penalty: NotNegative = 1.0
    truncated_is_wrong: bool = False


@dataclass(config=STRICT, frozen=True)
class EvaluationConfig:
    """Evaluation, during training (``run.evaluate_every``) and alone (``python -m fipo_megatron.evaluate``).

    Attributes:
        files: Problems, in the formats of ``data.files``. Results are reported for each ``data_source``, or for each
            file.
        samples_per_prompt: Responses per problem: k of avg@k, cons@k and pass@k.
        temperature: Sampling temperature.
        top_p: Cumulative probability of nucleus sampling; 1 disables it.
        checkpoint: Megatron checkpoint (torch_dist) to evaluate; null: the model in ``model.path``. Only for
            evaluation alone.
        name: Suffix of the result directory ``evaluation-NAME`` in ``run.output``; null: the last part of the path
            that is evaluated. Only for evaluation alone.
    """

    files: tuple[str, ...] = ()
    samples_per_prompt: Positive = 32
    temperature: PositiveNumber = 1.0
    top_p: Fraction = 0.7
    checkpoint: str | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None


@dataclass(config=STRICT, frozen=True)
class AmplifyConfig:
    """Extrapolation beyond RL at test time (``fipo evaluate``): draws from (1 + γ)·log π_RL − γ·log π_base.

    The evaluated model is RL.

    Attributes:
        base: Hugging Face directory of the base model; empty evaluates RL alone.
        gamma: Values of γ.
        threshold: Thresholds of log π_RL − log π_base: a token of the primary model below it is drawn again from the
            mixture. With null, every token is drawn from the mixture.
        primary: Model that draws first.
    """

    base: str = ""
    gamma: Annotated[tuple[PositiveNumber, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.5, 1.0)
    threshold: Annotated[tuple[Number | None, ...], Field(min_length=1)] = (None, -0.3, 0.0)
    primary: Literal["rl", "base"] = "rl"
