"""Groups and unfinished responses as few arrays, and back: for checkpoints, and for the way to another rank."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Group, Prompt, TokenSpan, Trajectory

_RECORDS = "records"


@dataclass(frozen=True, eq=False)
class PartialResponse:
    """A response that is not finished.

    Attributes:
        prompt: What was asked.
        sample: Its number.
        tokens: ``[R]`` int32 so far.
        log_probs: ``[R]`` float32.
        spans: Of the tokens; empty without.
        interruptions: How often it was aborted.
    """

    prompt: Prompt
    sample: int
    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    spans: tuple[TokenSpan, ...] = ()
    interruptions: int = 0

    @classmethod
    def new(cls, prompt: Prompt, sample: int) -> PartialResponse:
        """Nothing sampled yet."""
        return cls(prompt, sample, np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True, eq=False)
class PartialGroup:
    """A prompt whose group is not complete.

    Attributes:
        prompt: What was asked.
        finished: Responses that are finished, and scored.
        drafts: The others.
    """

    prompt: Prompt
    finished: tuple[Trajectory, ...]
    drafts: tuple[PartialResponse, ...]


Carried = tuple[list[Group], list[PartialGroup]]
"""What a sampler carries from one step to the next."""


def groups_to_arrays(groups: Iterable[Group], unfinished: Iterable[PartialGroup]) -> dict[str, NDArray[Any]]:
    """All arrays of a type in one, under its name; ``records`` holds the rest as JSON, ``[bytes]`` uint8."""
    parts: dict[str, list[NDArray[Any]]] = {"int32": [], "float32": [], "bool": []}
    ends = dict.fromkeys(parts, 0)

    def keep(array: NDArray[Any]) -> list[Any]:
        """Where it is: type, first and one past the last element."""
        kind = str(array.dtype)
        parts[kind].append(array)
        ends[kind] += len(array)
        return [kind, ends[kind] - len(array), ends[kind]]

    def prompt_of(prompt: Prompt) -> dict[str, Any]:
        return {
            "id": prompt.id,
            "tokens": keep(prompt.tokens),
            "ground_truth": prompt.ground_truth,
            "data_source": prompt.data_source,
        }

    def trajectory_of(one: Trajectory) -> dict[str, Any]:
        return {
            "sample": one.sample,
            "tokens": keep(one.tokens),
            "behaviour_log_probs": keep(one.behaviour_log_probs),
            "mask": keep(one.mask),
            "spans": [(span.start, span.weight_version) for span in one.spans],
            "finish_reason": one.finish_reason,
            "reward": one.reward,
            "accuracy": one.accuracy,
            "advantage": one.advantage,
        }

    def draft_of(one: PartialResponse) -> dict[str, Any]:
        return {
            "sample": one.sample,
            "tokens": keep(one.tokens),
            "log_probs": keep(one.log_probs),
            "spans": [(span.start, span.weight_version) for span in one.spans],
            "interruptions": one.interruptions,
        }

    records = {
        "groups": [
            {"prompt": prompt_of(group.prompt), "trajectories": [trajectory_of(t) for t in group.trajectories]}
            for group in groups
        ],
        "unfinished": [
            {
                "prompt": prompt_of(one.prompt),
                "finished": [trajectory_of(t) for t in one.finished],
                "drafts": [draft_of(d) for d in one.drafts],
            }
            for one in unfinished
        ],
    }
    arrays = {kind: np.concatenate([np.empty(0, kind), *found]) for kind, found in parts.items()}
    return arrays | {_RECORDS: np.frombuffer(json.dumps(records).encode(), dtype=np.uint8)}


def arrays_to_groups(arrays: Mapping[str, NDArray[Any]]) -> Carried:
    """What :func:`groups_to_arrays` was given."""
    records = json.loads(bytes(arrays[_RECORDS]).decode())

    def at(where: list[Any]) -> NDArray[Any]:
        kind, start, end = where
        return arrays[kind][start:end]

    def prompt_of(record: dict[str, Any]) -> Prompt:
        return Prompt(**(record | {"tokens": at(record["tokens"])}))

    def filled(record: dict[str, Any], *names: str) -> dict[str, Any]:
        spans = tuple(TokenSpan(start, version) for start, version in record["spans"])
        return record | {"spans": spans} | {name: at(record[name]) for name in names}

    def trajectory_of(prompt: Prompt, record: dict[str, Any]) -> Trajectory:
        return Trajectory(prompt=prompt, **filled(record, "tokens", "behaviour_log_probs", "mask"))

    groups, unfinished = [], []
    for record in records["groups"]:
        prompt = prompt_of(record["prompt"])
        groups.append(Group(prompt, tuple(trajectory_of(prompt, t) for t in record["trajectories"])))
    for record in records["unfinished"]:
        prompt = prompt_of(record["prompt"])
        finished = tuple(trajectory_of(prompt, t) for t in record["finished"])
        drafts = tuple(PartialResponse(prompt=prompt, **filled(d, "tokens", "log_probs")) for d in record["drafts"])
        unfinished.append(PartialGroup(prompt, finished, drafts))
    return groups, unfinished


def serialize_groups(groups: Iterable[Group], unfinished: Iterable[PartialGroup] = ()) -> bytes:
    """:func:`groups_to_arrays` as the content of an ``.npz`` file."""
    file = io.BytesIO()
    arrays: dict[str, Any] = groups_to_arrays(groups, unfinished)
    np.savez(file, **arrays)
    return file.getvalue()


def deserialize_groups(content: bytes) -> Carried:
    """What :func:`serialize_groups` was given."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays_to_groups(dict(arrays))
