"""The inputs of a standalone evaluation, read and checked before anything is loaded, converted or started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.config import Config
from fipo_megatron.data.model_directory import ModelDirectory, read_model_directory
from fipo_megatron.data.prompts import DataError
from fipo_megatron.data.tokenized_prompts import read_prompts
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.data.vocabulary import Vocabulary, vocabulary_difference
from fipo_megatron.evaluation.evaluation_summary import AMPLIFY, SUMMARY
from fipo_megatron.evaluation.results import data_set_name, name_problems
from fipo_megatron.reward.verifier import check_verifier
from fipo_megatron.rollout.engine_factory import context_problem, embedded_device_problem
from fipo_megatron.storage.output_directory import output_problems
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of a standalone evaluation.

    Attributes:
        companions: Directory with config.json and tokenizer of the model.
        architecture: Architecture of the model.
        tokenizer: Tokenizer of the model.
        stop_token_ids: Tokens that end a response.
        problems: Problems to answer.
        output: Directory of the results.
    """

    companions: Path
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    problems: Sequence[Prompt]
    output: Path


def output_directory(config: Config) -> Path:
    """Returns the directory of the results in ``run.output``: ``evaluation-NAME``, or ``amplify-NAME``."""
    path = Path(config.evaluation.checkpoint or config.model.path)
    name = config.evaluation.name or data_set_name(path.resolve().name)
    return Path(config.run.output) / f"{'amplify' if config.amplify.base else 'evaluation'}-{name}"


def read_evaluation_inputs(config: Config) -> EvaluationInputs:
    """Reads and checks the inputs without importing Megatron or starting anything.

    Raises:
        InputError: Inputs are missing or invalid; the message has one line per problem.
    """
    companions = _companions(config)
    served = config.evaluation.checkpoint is not None or bool(config.rollout.servers.urls)
    model = read_model_directory(companions, config.data, weights=not served)
    problems = _setting_problems(config)
    engine_problems = context_problem(config, model.architecture.max_positions), embedded_device_problem(config)
    problems += [problem for problem in engine_problems if problem]
    output = output_directory(config)
    problems += output_problems(output, "auto")
    if (output / (AMPLIFY if config.amplify.base else SUMMARY)).exists():
        problems.append(f"{output}: already holds an evaluation; choose another name with evaluation.name")
    problems += model.problems
    if config.amplify.base:
        problems += _amplify_problems(config, companions, model)
    try:
        if config.evaluation.checkpoint is not None:
            torch_dist.check(Path(config.evaluation.checkpoint), model.architecture, companions)
    except WeightsError as error:
        problems.append(str(error))
    prompts: Sequence[Prompt] = ()
    try:
        if model.tokenizer is not None:
            prompts = read_prompts(
                config.data, config.evaluation.files, model.tokenizer, field="evaluation.files", answer="answer"
            )
    except DataError as error:
        problems.append(str(error))
    problems += name_problems(prompt.data_source for prompt in prompts)
    if problems or model.tokenizer is None:
        raise InputError("\n".join(problems))
    return EvaluationInputs(companions, model.architecture, model.tokenizer, model.stop_token_ids, prompts, output)


def _setting_problems(config: Config) -> list[str]:
    """Describes settings that contradict each other or the launch, one line each."""
    problems = []
    ranks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if ranks != "1":
        problems.append(
            f"{ranks} processes: an evaluation is one process; start it without torchrun, or with srun -n 1"
        )
    servers = config.rollout.servers
    if config.evaluation.checkpoint is not None and config.rollout.engine == "sglang" and servers.urls:
        problems.append(
            f"evaluation.checkpoint = {config.evaluation.checkpoint}: must be null with rollout.servers.urls, which "
            "are evaluated with the weights that they serve"
        )
    if config.rollout.engine == "embedded" and servers.urls:
        problems.append(f"rollout.servers.urls = {list(servers.urls)}: needs rollout.engine = sglang")
    try:
        check_verifier(config.reward.verifier)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _amplify_problems(config: Config, companions: Path, rl: ModelDirectory) -> list[str]:
    """Describes why the base model cannot be mixed with the evaluated one, one line each."""
    problems = []
    if config.rollout.engine != "embedded":
        problems.append(
            f"rollout.engine = {config.rollout.engine}: must be embedded with amplify.base; a server has no second "
            "model to mix log-probs with"
        )
    path = Path(config.amplify.base)
    try:
        base = read_model_directory(path, config.data, weights=True)
    except ValueError as error:
        return [*problems, str(error).replace("model.path", "amplify.base")]
    problems += [problem.replace("model.path", "amplify.base") for problem in base.problems]
    if problem := context_problem(config, base.architecture.max_positions):
        problems.append(f"amplify.base = {path}: {problem}")
    if base.tokenizer is not None and rl.tokenizer is not None:
        name = (
            f"evaluation.checkpoint = {config.evaluation.checkpoint}"
            if config.evaluation.checkpoint is not None
            else f"model.path = {companions}"
        )
        difference = vocabulary_difference(
            Vocabulary(f"amplify.base = {path}", base.architecture.vocab, base.tokenizer, path),
            Vocabulary(name, rl.architecture.vocab, rl.tokenizer, companions),
        )
        problems += [difference] if difference else []
    return problems


def _companions(config: Config) -> Path:
    """Returns the directory with config.json and tokenizer.

    Raises:
        InputError: There is no such directory, or ``evaluation.checkpoint`` is not a checkpoint.
    """
    path, checkpoint = Path(config.model.path), config.evaluation.checkpoint
    if checkpoint is None:
        if not config.model.path or not (path / "config.json").is_file():
            raise InputError(
                f"model.path = {config.model.path!r}: has no config.json; a Hugging Face model is expected"
            )
        return path
    directory = Path(checkpoint)
    if not (directory / torch_dist.METADATA).is_file():
        nested = [*directory.glob("step-*"), *directory.glob("checkpoints/step-*")]
        hint = f"; there is {', '.join(map(str, sorted(nested)))}" if nested else ""
        raise InputError(
            f"evaluation.checkpoint = {checkpoint}: not a torch_dist checkpoint, it has no {torch_dist.METADATA}{hint}"
        )
    if (directory / torch_dist.HUGGING_FACE / "config.json").is_file():
        return directory / torch_dist.HUGGING_FACE
    if config.model.path and (path / "config.json").is_file():
        return path
    raise InputError(
        f"evaluation.checkpoint = {checkpoint}: has no {torch_dist.HUGGING_FACE}/config.json; name the Hugging Face "
        f"directory of the model in model.path, which is {config.model.path!r}"
    )
