"""The inputs of ``fipo compare swap``, read and checked before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.compare.shift_inputs import ComparedModel, read_compared_model
from fipo_megatron.config import Config, ModelConfig
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.vocabulary import vocabulary_difference
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from fipo_megatron.evaluation.results import data_set_name


@dataclass(frozen=True)
class SwapInputs:
    """The inputs of a comparison by swapped tokens.

    Attributes:
        base: The base model.
        rl: The RL model.
        answering: Inputs of the evaluation: problems, stop tokens and so on, the same for both models.
        seeds: Seeds of the responses.
        output: Directory of the results.
    """

    base: ComparedModel
    rl: ComparedModel
    answering: EvaluationInputs
    seeds: tuple[int, ...]
    output: Path


def output_directory(config: Config) -> Path:
    """Returns the directory of the results: ``swap-NAME`` in ``run.output``."""
    name = config.compare.name or data_set_name(Path(config.compare.rl).resolve().name)
    return Path(config.run.output) / f"swap-{name}"


def read_swap_inputs(config: Config) -> SwapInputs:
    """Reads and checks the inputs.

    Raises:
        InputError: Inputs are missing or invalid; the message has one line per problem.
    """
    if problems := _setting_problems(config):
        raise InputError("\n".join(problems))
    base = read_compared_model(config, "base", Path(config.compare.base))
    rl = read_compared_model(config, "rl", Path(config.compare.rl))
    if rl.is_checkpoint and config.compare.rl_urls:
        raise InputError(
            f"compare.rl = {rl.path}: must be a Hugging Face directory with compare.rl_urls, whose servers have loaded "
            "the model"
        )
    if difference := vocabulary_difference(base.vocabulary("base"), rl.vocabulary("rl")):
        raise InputError(difference)
    answering, other = (read_evaluation_inputs(answering_config(config, model)) for model in (base, rl))
    if difference := _answering_difference(base, rl, answering, other):
        raise InputError(difference)
    return SwapInputs(base, rl, answering, config.compare.seeds or (config.seed,), output_directory(config))


def answering_config(config: Config, model: ComparedModel) -> Config:
    """Returns the configuration of an evaluation of one of the models."""
    checkpoint = str(model.path) if model.is_checkpoint else None
    return replace(
        config,
        model=ModelConfig(str(model.companions)),
        evaluation=replace(config.evaluation, checkpoint=checkpoint, name="answering"),
        run=replace(config.run, output=str(output_directory(config))),
    )


def _setting_problems(config: Config) -> list[str]:
    """Describes settings with which tokens cannot be swapped, one line each."""
    compare, problems = config.compare, []
    problems += _server_problems(config)
    if not config.evaluation.files:
        problems.append("evaluation.files: empty; name the problems to answer")
    given: dict[str, Sequence[Any]] = {"select": compare.select, "seeds": compare.seeds}
    given["threshold" if compare.threshold else "share"] = compare.threshold or compare.share
    for name, values in given.items():
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            problems.append(f"compare.{name} = {list(values)}: names {twice[0]} more than once")
        if not values and name != "seeds":
            problems.append(f"compare.{name}: empty; expected at least one value")
    if compare.threshold and len(compare.select) != 1:
        problems.append(
            f"compare.select = {list(compare.select)}: must be one quantity with compare.threshold, since thresholds "
            "of different quantities differ; or use compare.share"
        )
    return problems


def _server_problems(config: Config) -> list[str]:
    """Describes settings that do not fit the engine, one line each."""
    compare, servers = config.compare, config.rollout.servers
    urls: dict[str, Sequence[str]] = {"base_urls": compare.base_urls, "rl_urls": compare.rl_urls}
    given = [name for name, values in urls.items() if values]
    if config.rollout.engine == "embedded":
        return [f"compare.{name} = {list(urls[name])}: needs rollout.engine = sglang" for name in given]
    problems = []
    if compare.select != ("delta",):
        problems.append(
            f"compare.select = {list(compare.select)}: must be [delta] with rollout.engine = sglang; a server gives "
            "the log-probs of tokens, and other quantities need the whole vocabulary: use rollout.engine = embedded"
        )
    if config.evaluation.temperature != 1:
        problems.append(
            f"evaluation.temperature = {config.evaluation.temperature:g}: must be 1 with rollout.engine = sglang; the "
            "log-probs that a server gives for the other model's tokens are those of temperature 1"
        )
    for name, value in (("urls", list(servers.urls)), ("router", servers.router)):
        if value:
            problems.append(
                f"rollout.servers.{name} = {value}: must not be set; the servers of each model are given in "
                "compare.base_urls and compare.rl_urls"
            )
    if len(given) == 1:
        [missing] = urls.keys() - set(given)
        problems.append(
            f"compare.{missing}: empty, with compare.{given[0]} = {list(urls[given[0]])}; give the servers of both "
            "models, or of neither to start them"
        )
    if both := [url for url in compare.base_urls if url in compare.rl_urls]:
        problems.append(f"compare.rl_urls = {list(compare.rl_urls)}: {both[0]} is in compare.base_urls, too")
    return problems


def _answering_difference(
    base: ComparedModel, rl: ComparedModel, answering: EvaluationInputs, other: EvaluationInputs
) -> str:
    """Describes how the models answer problems differently; empty if prompts and stop tokens are equal."""
    if answering.stop_token_ids != other.stop_token_ids:
        return (
            f"compare.rl = {rl.path}: ends responses with the tokens {list(other.stop_token_ids)}, compare.base = "
            f"{base.path} with {list(answering.stop_token_ids)}; they must be equal: eos_token_id in "
            "generation_config.json"
        )
    for one, two in zip(answering.problems, other.problems, strict=True):
        if not np.array_equal(one.tokens, two.tokens):
            return (
                f"compare.rl = {rl.path}: has other prompt tokens for problem {one.id} than compare.base = "
                f"{base.path}; the chat templates must be equal"
            )
    return ""
