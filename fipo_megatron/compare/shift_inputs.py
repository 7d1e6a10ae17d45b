"""The inputs of ``fipo compare shift``, read and checked before Megatron is imported or anything is built."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.actor.launch import Launch
from fipo_megatron.compare.response_file import NAME, GivenResponses, read_responses
from fipo_megatron.config import Config, EvaluationConfig, ModelConfig, RunConfig, layout_conflicts
from fipo_megatron.data.model_directory import ModelDirectory, read_model_directory
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.vocabulary import Vocabulary, vocabulary_difference
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from fipo_megatron.evaluation.results import data_set_name
from fipo_megatron.storage.output_directory import output_problems
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY, TOKENS, SETTINGS, PAGE = "summary.json", "tokens.jsonl", "settings.json", "report.html"


@dataclass(frozen=True)
class ComparedModel:
    """One of the two models.

    Attributes:
        path: Hugging Face directory, or Megatron checkpoint.
        companions: Directory with its config.json and tokenizer.
        architecture: Architecture of the model.
        tokenizer: Tokenizer of the model.
    """

    path: Path
    companions: Path
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase

    @property
    def is_checkpoint(self) -> bool:
        """Whether the model is a Megatron checkpoint."""
        return self.path != self.companions

    def vocabulary(self, role: str) -> Vocabulary:
        """Returns the vocabulary of the model ``compare.ROLE``."""
        return Vocabulary(f"compare.{role} = {self.path}", self.architecture.vocab, self.tokenizer, self.companions)


@dataclass(frozen=True)
class ShiftInputs:
    """The inputs of a comparison.

    Attributes:
        base: The base model.
        rl: The RL model.
        output: Directory of the results.
        responses: Responses to compare on; None if they are still to be sampled.
        sampling: Configuration and inputs of the evaluation that samples them; None if there are responses.
    """

    base: ComparedModel
    rl: ComparedModel
    output: Path
    responses: GivenResponses | None
    sampling: tuple[Config, EvaluationInputs] | None


def read_shift_inputs(config: Config) -> ShiftInputs:
    """Reads and checks the inputs.

    Raises:
        InputError: Inputs are missing or invalid; the message has one line per problem.
    """
    base = read_compared_model(config, "base", Path(config.compare.base))
    rl = read_compared_model(config, "rl", Path(config.compare.rl))
    world_size = Launch.from_environment(os.environ).world_size
    problems = layout_conflicts(config.actor.parallel, world_size)
    for model in (base, rl):
        problems += [f"{model.path}: {problem}" for problem in model.architecture.problems(config.actor)]
    if difference := vocabulary_difference(base.vocabulary("base"), rl.vocabulary("rl")):
        problems.append(difference)
    output = output_directory(config)
    problems += output_problems(output, "auto")
    if (output / SUMMARY).exists():
        problems.append(f"{output}: already holds a comparison; choose another name with compare.name")
    if problems:
        raise InputError("\n".join(problems))
    written = output / NAME
    if written.is_file() or config.compare.responses:
        paths = [str(written)] if written.is_file() else config.compare.responses
        responses = read_responses(paths, base.tokenizer, base.architecture.vocab)
        _check_lengths(config, responses)
        return ShiftInputs(base, rl, output, responses, None)
    if world_size > 1:
        raise InputError(
            f"compare.responses: empty, with {world_size} ranks; name files with responses, or start one process, "
            f"which samples them into {written}, and then all ranks"
        )
    return ShiftInputs(base, rl, output, None, _sampling(config, base if config.compare.sampler == "base" else rl))


def output_directory(config: Config) -> Path:
    """Returns the directory of the results: ``compare-NAME`` in ``run.output``."""
    name = config.compare.name or data_set_name(Path(config.compare.rl).resolve().name)
    return Path(config.run.output) / f"compare-{name}"


def read_compared_model(config: Config, role: str, path: Path) -> ComparedModel:
    """Reads one of the two models without its weights.

    Raises:
        InputError: The directory does not hold a model that can be compared.
    """
    field = f"compare.{role}"
    if not getattr(config.compare, role):
        raise InputError(f"{field}: missing; expected a Hugging Face directory{' or a checkpoint' * (role == 'rl')}")
    companions = path
    if (path / torch_dist.METADATA).is_file() and role == "rl":
        near = (path / torch_dist.HUGGING_FACE, Path(config.compare.base))
        companions = next(each for each in near if (each / "config.json").is_file() or each == near[-1])
    elif nested := sorted([*path.glob("step-*"), *path.glob("checkpoints/step-*")]):
        raise InputError(f"{field} = {path}: is not a model; there are checkpoints: {', '.join(map(str, nested))}")
    try:
        found: ModelDirectory = read_model_directory(companions, config.data, weights=companions == path)
        if companions != path:
            torch_dist.check(path, found.architecture, companions)
    except ValueError as error:
        raise InputError(str(error).replace("model.path", field)) from None
    if found.problems or found.tokenizer is None:
        raise InputError("\n".join(problem.replace("model.path", field) for problem in found.problems))
    return ComparedModel(path, companions, found.architecture, found.tokenizer)


def _check_lengths(config: Config, responses: GivenResponses) -> None:
    budget = config.actor.token_budget
    for trajectory in responses.trajectories:
        if len(trajectory) > budget:
            raise InputError(
                f"actor.token_budget = {budget}: must be at least {len(trajectory)}, the tokens of response "
                f"{trajectory.name} with its prompt"
            )


def _sampling(config: Config, sampler: ComparedModel) -> tuple[Config, EvaluationInputs]:
    """Returns the configuration and the inputs of the evaluation that samples the responses.

    Raises:
        InputError: There are no problems to answer, or the evaluation cannot run.
    """
    if not config.evaluation.files:
        raise InputError("compare.responses: empty, and so is evaluation.files; name responses, or problems to answer")
    evaluation: EvaluationConfig = replace(
        config.evaluation, checkpoint=str(sampler.path) if sampler.is_checkpoint else None, name="sampling"
    )
    run: RunConfig = replace(config.run, output=str(output_directory(config)))
    sampling = replace(config, model=ModelConfig(str(sampler.companions)), evaluation=evaluation, run=run)
    return sampling, read_evaluation_inputs(sampling)
