"""Carry-over to the next step: partial responses, partial groups, and their serialisation.

:class:`.sampler.Sampler` makes and keeps them. Serialised, they are part of checkpoints; groups also travel to other
ranks this way.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.data.trajectory import Group, Prompt, TokenSpan, Trajectory

RECORDS = "records"


@dataclass(frozen=True, eq=False)
class PartialResponse:
    """A response that is not finished.

    Attributes:
        prompt: Prompt of the response.
        sample: Number of the response among those to its prompt.
        tokens: ``[R]`` int32, the tokens so far.
        log_probs: ``[R]`` float32, log-probs of ``tokens``.
        spans: Weight versions of ``tokens``; empty without tokens.
        interruptions: Number of times it was aborted after a new token.
    """

    prompt: Prompt
    sample: int
    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    spans: tuple[TokenSpan, ...] = ()
    interruptions: int = 0

    @classmethod
    def new(cls, prompt: Prompt, sample: int) -> PartialResponse:
        """Returns a response without tokens."""
        return cls(prompt, sample, np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True, eq=False)
class PartialGroup:
    """A group whose responses are not all finished.

    Attributes:
        prompt: Prompt of the group.
        finished: Finished and scored responses.
        partial: The other responses.
    """

    prompt: Prompt
    finished: tuple[Trajectory, ...]
    partial: tuple[PartialResponse, ...]

    @classmethod
    def new(cls, prompt: Prompt, samples: int) -> PartialGroup:
        """Returns a group of this many responses without tokens."""
        return cls(prompt, (), tuple(PartialResponse.new(prompt, sample) for sample in range(samples)))


def is_usable(one: Group | PartialGroup, oldest: int, max_tokens: int) -> bool:
    """Returns whether a carried group can still be used: its weights are not too old, no response is too long.

    Args:
        one: Carried group.
        oldest: Oldest weight version that is allowed.
        max_tokens: Limit of a response. An unfinished response must be shorter.
    """
    finished, partial = _responses(one)
    spans = [span for response in finished for span in response.spans]
    spans += [span for response in partial for span in response.spans]
    return (
        all(span.weight_version >= oldest for span in spans)
        and all(len(response.tokens) <= max_tokens for response in finished)
        and all(len(response.tokens) < max_tokens for response in partial)
    )


def sampled_lengths(one: Group | PartialGroup) -> list[int]:
    """Returns the lengths of the responses of a group that have tokens."""
    finished, partial = _responses(one)
    lengths = [len(response.tokens) for response in finished] + [len(response.tokens) for response in partial]
    return [length for length in lengths if length]


def _responses(one: Group | PartialGroup) -> tuple[tuple[Trajectory, ...], tuple[PartialResponse, ...]]:
    return (one.trajectories, ()) if isinstance(one, Group) else (one.finished, one.partial)


Carried = tuple[list[Group], list[PartialGroup]]
"""Complete and partial groups that a sampler carries from one step to the next."""


class ArrayPacker:
    """Collects arrays by dtype, and describes objects by records that refer to their arrays.

    Attributes:
        parts: Arrays of each dtype, in the order in which they are concatenated.

    Args:
        uniform_masks: Whether a mask of equal values is described by this value, and not collected.
    """

    def __init__(self, *, uniform_masks: bool = False) -> None:
        self._uniform_masks = uniform_masks
        self.parts: dict[str, list[NDArray[Any]]] = {"int32": [], "float32": [], "bool": []}
        self._ends = dict.fromkeys(self.parts, 0)

    def add(self, array: NDArray[Any]) -> list[Any]:
        """Adds an array; returns its dtype, first element and one past its last element."""
        kind = str(array.dtype)
        self.parts[kind].append(array)
        self._ends[kind] += len(array)
        return [kind, self._ends[kind] - len(array), self._ends[kind]]

    def _mask(self, mask: NDArray[np.bool_]) -> list[Any] | bool:
        return bool(mask[0]) if self._uniform_masks and (mask == mask[0]).all() else self.add(mask)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the collected arrays, concatenated by dtype."""
        return {kind: np.concatenate([np.empty(0, kind), *found]) for kind, found in self.parts.items()}

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the record of a prompt."""
        return {
            "id": prompt.id,
            "tokens": self.add(prompt.tokens),
            "ground_truth": prompt.ground_truth,
            "data_source": prompt.data_source,
        }

    def trajectory(self, one: Trajectory) -> dict[str, Any]:
        """Returns the record of a finished response."""
        return {
            "sample": one.sample,
            "tokens": self.add(one.tokens),
            "behaviour_log_probs": self.add(one.behaviour_log_probs),
            "mask": self._mask(one.mask),
            "spans": [(span.start, span.weight_version) for span in one.spans],
            "finish_reason": one.finish_reason,
            "reward": one.reward,
            "accuracy": one.accuracy,
            "advantage": one.advantage,
            **({"failure": one.failure} if one.failure else {}),
        }

    def group(self, one: Group) -> dict[str, Any]:
        """Returns the record of a group."""
        return {
            "prompt": self.prompt(one.prompt),
            "trajectories": [self.trajectory(trajectory) for trajectory in one.trajectories],
        }

    def partial_response(self, one: PartialResponse) -> dict[str, Any]:
        """Returns the record of a response that is not finished."""
        return {
            "sample": one.sample,
            "tokens": self.add(one.tokens),
            "log_probs": self.add(one.log_probs),
            "spans": [(span.start, span.weight_version) for span in one.spans],
            "interruptions": one.interruptions,
        }


def groups_to_arrays(groups: Iterable[Group], partial: Iterable[PartialGroup]) -> dict[str, NDArray[Any]]:
    """Concatenates all arrays of a dtype to one.

    Returns:
        The concatenated arrays by dtype, and under ``records`` everything else as JSON, ``[bytes]`` uint8. Its keys
        ``unfinished`` and ``drafts``, for partial groups and partial responses, are those of older checkpoints.
    """
    packer = ArrayPacker()
    records = {
        "groups": [packer.group(group) for group in groups],
        "unfinished": [
            {
                "prompt": packer.prompt(group.prompt),
                "finished": [packer.trajectory(trajectory) for trajectory in group.finished],
                "drafts": [packer.partial_response(response) for response in group.partial],
            }
            for group in partial
        ],
    }
    return packer.arrays() | {RECORDS: np.frombuffer(json.dumps(records).encode(), dtype=np.uint8)}


def arrays_to_groups(arrays: Mapping[str, NDArray[Any]]) -> Carried:
    """Returns the groups and partial groups of :func:`groups_to_arrays`."""
    records = json.loads(bytes(arrays[RECORDS]).decode())

    def at(where: list[Any]) -> NDArray[Any]:
        kind, start, end = where
        return arrays[kind][start:end]

    def prompt_of(record: dict[str, Any]) -> Prompt:
        return Prompt(**(record | {"tokens": at(record["tokens"])}))

    def filled(record: dict[str, Any], *names: str) -> dict[str, Any]:
        spans = tuple(TokenSpan(start, version) for start, version in record["spans"])
        return record | {"spans": spans} | {name: at(record[name]) for name in names}

    def trajectory_of(prompt: Prompt, record: dict[str, Any]) -> Trajectory:
        values = filled(record, "tokens", "behaviour_log_probs")
        mask = record["mask"]
        values["mask"] = np.broadcast_to(mask, len(values["tokens"])) if isinstance(mask, bool) else at(mask)
        return Trajectory(prompt=prompt, **values)

    groups, partial = [], []
    for record in records["groups"]:
        prompt = prompt_of(record["prompt"])
        groups.append(Group(prompt, tuple(trajectory_of(prompt, t) for t in record["trajectories"])))
    for record in records["unfinished"]:
        prompt = prompt_of(record["prompt"])
        finished = tuple(trajectory_of(prompt, t) for t in record["finished"])
        responses = tuple(PartialResponse(prompt=prompt, **filled(r, "tokens", "log_probs")) for r in record["drafts"])
        partial.append(PartialGroup(prompt, finished, responses))
    return groups, partial


def serialize_groups(groups: Iterable[Group], partial: Iterable[PartialGroup] = ()) -> bytes:
    """Returns the arrays of :func:`groups_to_arrays` as the content of an ``.npz`` file."""
    file = io.BytesIO()
    arrays: dict[str, Any] = groups_to_arrays(groups, partial)
    np.savez(file, **arrays)
    return file.getvalue()


def deserialize_groups(content: bytes) -> Carried:
    """Returns the groups and partial groups of :func:`serialize_groups`."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays_to_groups(dict(arrays))
