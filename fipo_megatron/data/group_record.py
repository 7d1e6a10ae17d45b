"""The metadata of a group of responses, without tokens. Every rank has it for every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fipo_megatron.data.trajectory import Group, Trajectory


@dataclass(frozen=True)
class GroupRecord:
    """The metadata of a scored group.

    Attributes:
        prompt: ``Prompt.id``.
        leader: Rank that holds the tokens.
        samples: Sample numbers of the responses.
        prompt_tokens: Tokens of the prompt.
        response_tokens: Tokens of each response.
        rewards: Shaped reward of each response; None if its check failed and it is masked.
        accuracies: Accuracy of each response, 0 or 1; None where its reward is.
        oldest: Oldest version of the weights that sampled any token of the group.
        truncated: Responses that were cut off at the length limit.
    """

    prompt: str
    leader: int
    samples: tuple[int, ...]
    prompt_tokens: int
    response_tokens: tuple[int, ...]
    rewards: tuple[float | None, ...]
    accuracies: tuple[int | None, ...]
    oldest: int
    truncated: int = 0

    @classmethod
    def of(cls, group: Group, leader: int) -> GroupRecord:
        """Returns the record of a scored group.

        Args:
            group: Group whose responses are scored.
            leader: Rank that holds the tokens.
        """
        trajectories = group.trajectories
        return cls(
            prompt=group.prompt.id,
            leader=leader,
            samples=tuple(t.sample for t in trajectories),
            prompt_tokens=len(group.prompt.tokens),
            response_tokens=tuple(len(t.tokens) for t in trajectories),
            rewards=tuple(None if _is_masked(t) else float(t.reward or 0.0) for t in trajectories),
            accuracies=tuple(None if _is_masked(t) else int(t.accuracy or 0) for t in trajectories),
            oldest=min(span.weight_version for t in trajectories for span in t.spans),
            truncated=sum(t.finish_reason == "length" for t in trajectories),
        )

    @classmethod
    def parse(cls, values: dict[str, Any]) -> GroupRecord:
        """Returns the record that decoded JSON holds: lists become tuples."""
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
        """Tokens of each response, prompt included."""
        return [self.prompt_tokens + length for length in self.response_tokens]


def _is_masked(trajectory: Trajectory) -> bool:
    """Returns whether a response is masked because its check failed."""
    return bool(trajectory.failure) and trajectory.reward is None
