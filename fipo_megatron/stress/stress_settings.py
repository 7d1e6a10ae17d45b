"""The settings of a stress run, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.actor.launch import Launch
from fipo_megatron.actor.parallel import check_world_size
from fipo_megatron.config import Config, load_config
from fipo_megatron.config.padding import micro_batch_multiple
from fipo_megatron.data.model_directory import read_model_directory
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.plan.response_lengths import SPREAD, ResponseLengths
from fipo_megatron.rollout.engine_factory import embedded_device_problem
from fipo_megatron.stress.limits import Limit, read_limits
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["engine", "actor", "drift"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class StressOptions:
    """The options of the command.

    Attributes:
        config: Path of the configuration.
        overrides: Overrides of the configuration, ``key=value``.
        lengths: Tokens of a sequence, prompt and response together; ascending.
        parts: Parts to run.
        prompt_tokens: Tokens of every prompt.
        responses: Responses that the engine samples at each length.
        sequences: Sequences per data-parallel replica in the actor's mini-batch; None: as many as fill the pipeline.
        median: Median of log-normal response lengths, which are cut at the length; None: every response has the length.
        spread: Standard deviation of the logarithm of the response length.
        budget: File with limits; None: nothing is compared.
        output: Directory of the results; None: ``stress`` in ``run.output``.
    """

    config: str
    overrides: tuple[str, ...]
    lengths: tuple[int, ...]
    parts: tuple[Part, ...] = PARTS
    prompt_tokens: int = 64
    responses: int = 8
    sequences: int | None = None
    median: int | None = None
    spread: float = SPREAD
    budget: Path | None = None
    output: Path | None = None


@dataclass(frozen=True)
class StressSettings:
    """A stress run that can start.

    Attributes:
        options: Options of the command.
        configs: Configuration at each length: length limits and token budget are those of the length.
        architecture: Architecture of the model.
        tokenizer: Tokenizer of the model; None if no engine is used.
        limits: Limits of the budget.
        output: Directory of the results.
    """

    options: StressOptions
    configs: Mapping[int, Config]
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase | None
    limits: tuple[Limit, ...]
    output: Path

    @property
    def longest(self) -> Config:
        """Configuration at the longest length."""
        return self.configs[max(self.configs)]

    @property
    def samples(self) -> bool:
        """Whether an engine samples."""
        return bool({"engine", "drift"} & set(self.options.parts))

    def response_lengths(self, length: int, count: int) -> NDArray[np.int64]:
        """Returns the response lengths of ``count`` sequences of at most ``length`` tokens, ``[count]``."""
        limit = length - self.options.prompt_tokens
        if self.options.median is None:
            return np.full(count, limit)
        lengths = ResponseLengths(self.options.median, self.options.spread, limit).sample(count)
        return np.random.default_rng(0).permutation(lengths)

    def prompt(self, length: int, number: int) -> Prompt:
        """Returns a prompt of random tokens; no two share a prefix that an engine could keep."""
        rng = np.random.default_rng([length, number])
        tokens = rng.integers(0, self.architecture.vocab, self.options.prompt_tokens).astype(np.int32)
        return Prompt(f"stress/{length}/{number}", tokens, "")


def read_settings(options: StressOptions, environment: Mapping[str, str]) -> StressSettings:
    """Reads configuration, model and budget, and checks them with the lengths.

    Args:
        options: Options of the command.
        environment: Environment variables of the launcher.

    Raises:
        ValueError: Something is not valid; the message has every problem that was found.
    """
    limits = read_limits(options.budget, options.parts, options.lengths) if options.budget else ()
    plain = load_config(options.config, options.overrides)
    if plain.algorithm.kind == "sft":
        raise ValueError("algorithm.kind = sft: must be fipo, dapo or grpo; supervised fine-tuning samples nothing")
    check_world_size(plain.actor.parallel, Launch.from_environment(environment).world_size)
    if not plain.model.path:
        raise ValueError("model.path: missing; the directory of a Hugging Face model")
    samples = bool({"engine", "drift"} & set(options.parts))
    if samples:
        model = read_model_directory(Path(plain.model.path), plain.data, weights=True)
        if model.problems:
            raise ValueError("\n".join(model.problems))
        architecture, tokenizer = model.architecture, model.tokenizer
    else:
        architecture, tokenizer = _architecture(Path(plain.model.path)), None
    problems = architecture.problems(plain.actor) + _length_problems(options, architecture.max_positions)
    if samples and (problem := embedded_device_problem(plain)):
        problems.append(problem)
    if problems:
        raise ValueError("\n".join(problems))
    output = options.output or Path(plain.run.output) / "stress"
    configs = {length: _config_at(options, plain, length) for length in options.lengths}
    return StressSettings(options, configs, architecture, tokenizer, limits, output)


def _architecture(path: Path) -> Architecture:
    try:
        return Architecture.from_directory(path)
    except FileNotFoundError:
        raise ValueError(f"model.path = {path}: has no config.json; a Hugging Face model is expected") from None


def _length_problems(options: StressOptions, context: int) -> list[str]:
    problems = [
        f"--lengths {length}: must be at most the model's context, max_position_embeddings = {context} in its "
        "config.json"
        for length in options.lengths
        if length > context
    ]
    shortest = min(options.lengths) - options.prompt_tokens
    if shortest < 1:
        problems.append(
            f"--lengths {min(options.lengths)}: must be above --prompt-tokens {options.prompt_tokens}; the rest of a "
            "sequence is its response"
        )
    elif options.median is not None and options.median > shortest:
        problems.append(
            f"--median {options.median}: must be at most {shortest}, the longest response at --lengths "
            f"{min(options.lengths)}"
        )
    return problems


def _config_at(options: StressOptions, plain: Config, length: int) -> Config:
    """Returns the configuration whose longest sequence, and whose micro-batches, have ``length`` tokens."""
    multiple = micro_batch_multiple(plain.actor)
    return load_config(
        options.config,
        [
            *options.overrides,
            f"data.max_prompt_tokens={options.prompt_tokens}",
            f"rollout.max_response_tokens={length - options.prompt_tokens}",
            f"actor.token_budget={-(-length // multiple) * multiple}",
            "reward.overlong_buffer_tokens=0",
        ],
    )


def option_lengths(text: str) -> tuple[int, ...]:
    """Returns the lengths of an option such as ``16384,32768``, ascending.

    Raises:
        ValueError: A length is not a positive integer, or is given twice.
    """
    lengths = _integers(text)
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ValueError(f"--lengths {text}: expected different positive integers such as 16384,32768")
    return tuple(sorted(lengths))


def _integers(text: str) -> Sequence[int]:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isascii() and part.isdecimal() for part in parts) else []


def option_parts(text: str) -> tuple[Part, ...]:
    """Returns the parts of an option such as ``engine,drift``, in the order in which they run.

    Raises:
        ValueError: A part does not exist.
    """
    given = [part.strip() for part in text.split(",")]
    for part in given:
        if part not in PARTS:
            raise ValueError(f"--parts {text}: there is no part {part!r}; valid: {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in given)
