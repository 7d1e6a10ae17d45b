"""The inputs of a training run, read and checked before anything is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.actor.launch import Launch
from fipo_megatron.actor.parallel import check_world_size
from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.config import Config
from fipo_megatron.data.model_directory import read_model_directory
from fipo_megatron.data.prompt_table import PromptTable
from fipo_megatron.data.prompts import DataError
from fipo_megatron.data.tokenized_prompts import read_prompts
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.evaluation.results import name_problems
from fipo_megatron.moments.candidates import CandidateExtractor
from fipo_megatron.observe.trackers import tracker_problems
from fipo_megatron.reward.verifier import check_verifier
from fipo_megatron.rollout.engine_factory import context_problem, embedded_device_problem
from fipo_megatron.rollout.sglang.nccl_version import nccl_problem
from fipo_megatron.rollout.weight_sync.tensor_sender import size_problem
from fipo_megatron.storage.output_directory import output_problems
from fipo_megatron.trainer.server_inputs import check_running_servers, gpu_problem
from fipo_megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a training run.

    Attributes:
        architecture: Architecture of the model.
        tokenizer: Tokenizer of the model.
        stop_token_ids: Ids of the tokens that end a response.
        prompts: Training prompts, in the order of the files.
        problems: Evaluation problems; empty if the run does not evaluate.
    """

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    prompts: PromptTable
    problems: Sequence[Prompt] = ()


def read_training_inputs(config: Config) -> TrainingInputs:
    """Reads and checks the inputs; imports no Megatron and writes nothing to ``run.output``.

    Raises:
        InputError: With every problem found.
        EngineError: Running servers do not serve the model; see :func:`.server_inputs.check_running_servers`.
    """
    sft = config.algorithm.kind == "sft"
    model = read_model_directory(Path(config.model.path), config.data, weights=True, needs_eos=sft)
    problems = [*_environment_problems(config, model.architecture), *model.problems]
    if problems or model.tokenizer is None:  # told at once: millions of rows take a minute to read
        raise InputError("\n".join(problems))
    if _samples(config):
        check_running_servers(config, model.tokenizer, model.architecture.vocab)
    prompts = PromptTable(())
    evaluation_prompts: Sequence[Prompt] = ()
    try:
        answer = "response" if sft else "answer"
        prompts = read_prompts(
            config.data,
            config.data.files,
            model.tokenizer,
            field="data.files",
            answer=answer,
            share=Launch.from_environment(os.environ).world_size > 1,
        )
        if config.evaluation.files and config.run.evaluate_every:
            evaluation_prompts = read_prompts(
                config.data, config.evaluation.files, model.tokenizer, field="evaluation.files", answer="answer"
            )
            problems += name_problems(prompt.data_source for prompt in evaluation_prompts)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return TrainingInputs(model.architecture, model.tokenizer, model.stop_token_ids, prompts, evaluation_prompts)


def check_megatron_options(config: Config, architecture: Architecture) -> None:
    """Raises ValueError for Megatron options that do not exist or do not go together; imports Megatron."""
    from fipo_megatron.actor import megatron_config  # takes seconds to import; other mistakes are reported before

    megatron_config.check(architecture, config.actor)
    megatron_config.check_auxiliary_losses(config)


def _environment_problems(config: Config, architecture: Architecture) -> list[str]:
    """Lists what does not fit apart from tokenizer and data: context, verifier, launcher, packages, output, resume."""
    problems = []
    if problem := context_problem(config, architecture.max_positions):
        problems.append(problem)
    if config.algorithm.kind != "sft":
        try:
            check_verifier(config.reward.verifier)
        except ValueError as error:
            problems.append(str(error))
        problems += _extractor_problems(config)
    problems += _launch_problems(config)
    problems += _engine_problems(config, architecture)
    problems += tracker_problems(
        config.observe, writes=os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    )
    output = Path(config.run.output)
    problems += output_problems(output, config.checkpoint.resume) or _checkpoint_problems(
        output / "checkpoints", architecture, config
    )
    if config.evaluation.checkpoint is not None:
        problems.append(
            f"evaluation.checkpoint = {config.evaluation.checkpoint}: is for python -m fipo_megatron.evaluate alone; a "
            "run evaluates its own weights"
        )
    return problems


def _extractor_problems(config: Config) -> list[str]:
    """Lists why the extractor of moments is invalid."""
    try:
        if config.observe.moments:
            CandidateExtractor.named(config.observe.moments_extractor)
    except ValueError as error:
        return [f"observe.moments_extractor: {error}"]
    return []


def _samples(config: Config) -> bool:
    """Returns whether the run has an engine."""
    return config.algorithm.kind != "sft" and not config.run.replay


def _engine_problems(config: Config, architecture: Architecture) -> list[str]:
    """Lists why the engine could not be opened, or weights not be sent to it."""
    if not _samples(config):
        return []
    found = (
        embedded_device_problem(config),
        gpu_problem(config),
        size_problem(config, architecture),
        nccl_problem(config),
    )
    return [problem for problem in found if problem]


def _launch_problems(config: Config) -> list[str]:
    """Lists what is missing in the launcher's environment, or why its number of ranks does not fit the layout."""
    try:
        check_world_size(config.actor.parallel, Launch.from_environment(os.environ).world_size)
    except ValueError as error:
        return [str(error)]
    return []


def _checkpoint_problems(checkpoints: Path, architecture: Architecture, config: Config) -> list[str]:
    """Lists why the newest checkpoint cannot be resumed: another model, or a layout that cannot load its optimizer."""
    if config.checkpoint.resume == "never" or (newest := _newest_manifest(checkpoints)) is None:
        return []
    path, saved = newest
    problems = []
    if changed := manifest.differences(saved.architecture, manifest.describe_architecture(architecture)):
        problems.append(f"{path}: a checkpoint of another model: {', '.join(changed)}")
    if saved.config["checkpoint"]["optimizer_sharding"] == "dp_reshardable":
        problems += [
            f"actor.parallel.{size} = {now}: must be {saved.parallel.get(size)} to go on from {path}, whose optimizer "
            "was saved with checkpoint.optimizer_sharding = dp_reshardable"
            for size in ("tensor_parallel", "pipeline_parallel")
            if (now := getattr(config.actor.parallel, size)) != saved.parallel.get(size)
        ]
    return problems


def _newest_manifest(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """Returns the newest checkpoint whose manifest matches its checksum; resuming sets damaged ones aside."""
    for _, path in manifest.list_checkpoints(checkpoints):
        with suppress(ValueError):
            return path, Manifest.read_verified(path)
    return None
