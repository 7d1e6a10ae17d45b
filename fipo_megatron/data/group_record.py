"""The metadata of a group of responses, which every rank knows; no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fipo_megatron.data.trajectory import Group


@dataclass(frozen=True)
class GroupRecord:
    """What every rank knows of a group.

    Attributes:
        prompt: ``Prompt.id``.
        leader: The rank that has it.
        samples: Numbers of its responses.
        prompt_tokens: Of the prompt.
        response_tokens: Of each response.
        rewards: Of each response.
        accuracies: Of each response.
        oldest: The oldest version of the weights that sampled any of it.
        truncated: How many responses were cut off at the length limit.
    """

    prompt: str
    leader: int
    samples: tuple[int, ...]
    prompt_tokens: int
    response_tokens: tuple[int, ...]
    rewards: tuple[float, ...]
    accuracies: tuple[int, ...]
    oldest: int
    truncated: int = 0

    @classmethod
    def of(cls, group: Group, leader: int) -> GroupRecord:
        """Of a scored group."""
        all_ = group.trajectories
        return cls(
            prompt=group.prompt.id,
            leader=leader,
            samples=tuple(t.sample for t in all_),
            prompt_tokens=len(group.prompt.tokens),
            response_tokens=tuple(len(t.tokens) for t in all_),
            rewards=tuple(float(t.reward or 0.0) for t in all_),
            accuracies=tuple(int(t.accuracy or 0) for t in all_),
            oldest=min(span.weight_version for t in all_ for span in t.spans),
            truncated=sum(t.finish_reason == "length" for t in all_),
        )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> GroupRecord:
        """Of JSON."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)

    @property
    def names(self) -> list[str]:
        """``Trajectory.name`` of each response."""
        return [f"{self.prompt}/{sample}" for sample in self.samples]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response with its prompt."""
        return [self.prompt_tokens + length for length in self.response_tokens]
