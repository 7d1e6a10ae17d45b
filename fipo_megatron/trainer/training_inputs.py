"""All that a run reads, read and checked before anything is built."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fipo_megatron.actor.launch import Launch
from fipo_megatron.actor.parallel import check_world_size
from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.config import Config
from fipo_megatron.data.prompts import DataError, Messages, read_problems, tokenize
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.evaluation.results import name_problems
from fipo_megatron.observe.trackers import missing_packages
from fipo_megatron.reward.verifier import check_verifier
from fipo_megatron.rollout.engine_factory import context_problem
from fipo_megatron.weights.architecture import Architecture


class InputError(ValueError):
    """What the run is to read is not there, or does not fit; all that is wrong is said at once."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a run reads.

    Attributes:
        architecture: Of the model.
        tokenizer: Of the model.
        stop_token_ids: Responses end with one of these.
        prompts: To train on.
        problems: To evaluate with.
    """

    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    problems: tuple[Prompt, ...] = ()


def read_training_inputs(config: Config) -> TrainingInputs:
    """Reads and checks; imports no Megatron, starts nothing.

    Raises:
        InputError: with everything that is wrong.
        ValueError: the model cannot be trained here.
    """
    problems = []
    path = Path(config.model.path)
    if not (path / "config.json").is_file():
        raise InputError(f"model.path = {config.model.path!r}: has no config.json; a Hugging Face model is expected")
    architecture = Architecture.from_directory(path)
    if problem := context_problem(config, architecture.max_positions):
        problems.append(problem)
    if config.algorithm.kind != "sft":
        try:
            check_verifier(config.reward.verifier)
        except ValueError as error:
            problems.append(str(error))
    problems += _unfit_launch(config)
    problems += missing_packages(config.observe)
    problems += output_problems(Path(config.run.output), config.checkpoint.resume)
    problems += _unfit_checkpoint(Path(config.run.output) / "checkpoints", architecture, config)
    if config.evaluation.checkpoint is not None:
        problems.append(
            f"evaluation.checkpoint = {config.evaluation.checkpoint}: is for python -m fipo_megatron.evaluate alone; a "
            "run evaluates its own weights"
        )
    prompts, to_evaluate = [], []  # type: tuple[list[Prompt], list[Prompt]]
    tokenizer, unusable = read_tokenizer(config, path)
    problems += unusable
    if tokenizer is not None and not unusable:
        answer = "response" if config.algorithm.kind == "sft" else "answer"
        try:
            prompts = read_prompts(config, config.data.files, tokenizer, "data.files", answer)
            if config.evaluation.files and config.run.evaluate_every:
                to_evaluate = read_prompts(config, config.evaluation.files, tokenizer, "evaluation.files", "answer")
                problems += name_problems(prompt.data_source for prompt in to_evaluate)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    assert tokenizer is not None
    return TrainingInputs(architecture, tokenizer, stop_tokens(path, tokenizer), tuple(prompts), tuple(to_evaluate))


def _unfit_launch(config: Config) -> list[str]:
    """Whether the launcher has said who this is, and started as many ranks as the layout needs."""
    try:
        check_world_size(config.actor.parallel, Launch.from_environment(os.environ).world_size)
    except ValueError as error:
        return [str(error)]
    return []


def read_tokenizer(config: Config, path: Path) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """That of a model's directory, and what is wrong with it; None: there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        return None, [f"model.path = {path}: no tokenizer: {error}"]
    if tokenizer.chat_template or config.data.chat_template != "tokenizer":
        return tokenizer, []
    return tokenizer, [
        f"model.path = {path}: its tokenizer has no chat template, and prompts are conversations; with "
        "data.chat_template=none they are plain text"
    ]


def read_prompts(
    config: Config, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, field: str, answer: str
) -> list[Prompt]:
    """All of the files that are short enough.

    Args:
        config: Of the run; ``data`` is read.
        files: To read.
        tokenizer: Of the model.
        field: Of the configuration that names the files.
        answer: The column of jsonl files that holds the answer.

    Raises:
        DataError: a file is not what it should be, or nothing is there.
    """
    if not files:
        raise DataError(f"{field}: is empty; expected .parquet or .jsonl files")

    def tokens_of(messages: Messages) -> list[int]:
        if config.data.chat_template == "none":
            return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    apart = field == "evaluation.files"
    found = read_problems(files, answer=answer, once=answer == "answer", apart=apart)
    return tokenize(found, tokens_of, config.data.max_prompt_tokens)


def stop_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-sequence tokens of the tokenizer and of generation_config.json.

    Raises:
        InputError: there are none.
    """
    found = {tokenizer.eos_token_id}
    if (file := path / "generation_config.json").is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named}
    found.discard(None)
    if not found:
        raise InputError(f"model.path = {path}: neither tokenizer nor generation_config.json has an eos token")
    return tuple(sorted(found))


def output_problems(output: Path, resume: str) -> list[str]:
    """Whether the run can write there."""
    if resume == "never" and output.exists() and any(output.iterdir()):
        return [
            f"run.output = {output}: already holds a run; choose another, or checkpoint.resume=auto to go on with it"
        ]
    existing = output
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"run.output = {output}: cannot be written"]
    return []


def _unfit_checkpoint(checkpoints: Path, architecture: Architecture, config: Config) -> list[str]:
    """Whether the newest checkpoint holds the model, in a way that this layout can load."""
    found = manifest.list_checkpoints(checkpoints)
    if config.checkpoint.resume == "never" or not found:
        return []
    path = found[0][1]
    try:
        saved = Manifest.read(path)
    except ValueError:
        return []  # damaged: found out, and said, when it is loaded
    problems = []
    if changed := manifest.differences(saved.architecture, manifest.describe_architecture(architecture)):
        problems.append(f"{path}: a checkpoint of another model: {', '.join(changed)}")
    if saved.config["checkpoint"]["optimizer_sharding"] == "dp_reshardable":
        problems += [
            f"actor.parallel.{size} = {now}: must be {saved.parallel[size]} to go on from {path}, whose optimizer was "
            "saved with checkpoint.optimizer_sharding = dp_reshardable"
            for size in ("tensor_parallel", "pipeline_parallel")
            if (now := getattr(config.actor.parallel, size)) != saved.parallel[size]
        ]
    return problems


def sft_example(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, longest: int) -> Trajectory:
    """An example of what to say (``algorithm.kind = sft``), cut off after so many tokens."""
    ids = tokenizer(prompt.ground_truth, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tokens = np.array(ids[:longest], np.int32)
    return Trajectory(
        prompt=prompt,
        sample=0,
        tokens=tokens,
        behaviour_log_probs=np.zeros(len(tokens), np.float32),
        mask=np.ones(len(tokens), np.bool_),
        finish_reason="stop" if len(ids) <= longest else "length",
        advantage=0.0,
    )
