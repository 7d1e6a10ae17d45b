"""The responses of a comparison as exact token ids: read from the files of runs, and written to ``responses.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.rollout import carry_over

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "responses.jsonl"


@dataclass(frozen=True)
class GivenResponses:
    """Responses that were read.

    Attributes:
        trajectories: The responses, with advantage 0 and every token in the mask.
        inexact: Number of rows that are left out: their text does not give the recorded number of tokens.
        files: Files that were read.
    """

    trajectories: tuple[Trajectory, ...]
    inexact: int
    files: tuple[Path, ...]


def read_responses(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab: int) -> GivenResponses:
    """Reads responses from files and directories.

    A directory holds ``responses.jsonl`` of a comparison, ``rollouts/`` (``run.record_rollouts``) or ``trajectories/``
    of a run; the first of these that exists is read. Rows without token ids are tokenized again.

    Args:
        paths: Files or directories, ``compare.responses``.
        tokenizer: Tokenizer of both models.
        vocab: Size of the vocabulary.

    Raises:
        InputError: A path holds no responses, a file is damaged, or no response is left.
    """
    files = [file for path in paths for file in _files(Path(path))]
    found: list[Trajectory] = []
    inexact = 0
    for file in files:
        try:
            if file.suffix == ".npz":
                groups, _ = carry_over.deserialize_groups(file.read_bytes())
                found += [as_given(trajectory) for group in groups for trajectory in group.trajectories]
                continue
            for row in _rows(file):
                trajectory = _trajectory(row, tokenizer)
                inexact += trajectory is None
                found += [] if trajectory is None else [trajectory]
        except Exception as error:  # a damaged file raises errors of any type
            raise InputError(f"compare.responses: {file}: is damaged: {type(error).__name__}: {error}") from None
    for trajectory in found:
        largest = max(int(trajectory.tokens.max()), int(trajectory.prompt.tokens.max()))
        if largest >= vocab:
            raise InputError(
                f"compare.responses: response {trajectory.name}: token id {largest} is not below the vocabulary size "
                f"{vocab}; the responses are of another model"
            )
    if not found:
        raise InputError(f"compare.responses = {list(paths)}: hold no usable response; {inexact} rows are inexact")
    return GivenResponses(tuple(found), inexact, tuple(files))


def as_given(trajectory: Trajectory) -> Trajectory:
    """Returns a response with advantage 0 and all tokens in the mask, so that every position is compared."""
    return replace(trajectory, advantage=0.0, mask=np.ones(len(trajectory.tokens), np.bool_))


def response_lines(trajectories: Iterable[Trajectory], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the content of ``responses.jsonl``: token ids, and the text that ``fipo moments`` reads."""
    return "".join(json.dumps(response_row(trajectory, tokenizer)) + "\n" for trajectory in trajectories)


def response_row(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns a row of ``responses.jsonl``."""
    prompt = trajectory.prompt
    return {
        "prompt_id": prompt.id,
        "sample": trajectory.sample,
        "data_source": prompt.data_source,
        "ground_truth": prompt.ground_truth,
        "accuracy": trajectory.accuracy,
        "finish_reason": trajectory.finish_reason,
        "prompt": str(tokenizer.decode(prompt.tokens.tolist())),
        "response": str(tokenizer.decode(trajectory.tokens.tolist(), skip_special_tokens=True)),
        "response_tokens": len(trajectory.tokens),
        "prompt_ids": prompt.tokens.tolist(),
        "response_ids": trajectory.tokens.tolist(),
    }


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    candidates = ([path / NAME], sorted(path.glob("rollouts/*.npz")), sorted(path.glob("trajectories/from-*.jsonl")))
    for files in candidates:
        if files and files[0].is_file():
            return files
    raise InputError(
        f"compare.responses: {path}: holds no responses; expected a trajectory file, a .npz file of recorded rollouts, "
        f"or a directory with {NAME}, rollouts/ or trajectories/"
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # the last row of a run that is writing may be unfinished
                yield json.loads(line)


def _trajectory(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Trajectory | None:
    """Returns the response of a row; None if its text does not give the recorded number of tokens."""
    if "response_ids" in row:
        prompt, tokens = row["prompt_ids"], row["response_ids"]
    else:
        prompt, tokens = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response")
        )
        if len(tokens) != row["response_tokens"]:
            return None
    return Trajectory(
        prompt=Prompt(
            str(row.get("prompt_id", "")),
            np.array(prompt),
            str(row.get("ground_truth", "")),
            str(row.get("data_source", "")),
        ),
        sample=int(row.get("sample", 0)),
        tokens=np.array(tokens),
        behaviour_log_probs=np.zeros(len(tokens), np.float32),
        mask=np.ones(len(tokens), np.bool_),
        finish_reason=row.get("finish_reason", "stop"),
        accuracy=row.get("accuracy"),
        advantage=0.0,
    )
