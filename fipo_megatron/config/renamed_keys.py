"""Keys of older versions that have a new place; using the old one is an error that names the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fipo_megatron.config.rollout_sections import RolloutConfig


class RenamedKey(NamedTuple):
    """A key and its present place.

    Attributes:
        old: Dotted key of older versions.
        new: Dotted key now.
        kind: The ``algorithm.kind`` to which the new place is limited; None: all of them.
        default: Value of the old key that is accepted because it changes nothing; a complete configuration, as
            ``fipo config`` prints it, has it. None: no value is accepted.
    """

    old: str
    new: str
    kind: str | None = None
    default: Any = None


RENAMED_KEYS = (
    RenamedKey("run.save_every", "checkpoint.save_every"),
    RenamedKey("run.async_save", "checkpoint.async_save"),
    RenamedKey("run.keep_last", "checkpoint.keep_last"),
    RenamedKey("run.keep_best", "checkpoint.keep_best"),
    RenamedKey("run.optimizer_sharding", "checkpoint.optimizer_sharding"),
    RenamedKey("run.export_every", "checkpoint.export_every"),
    RenamedKey("run.resume", "checkpoint.resume"),
    RenamedKey(
        "rollout.prompts_per_step",
        "sft.examples_per_step",
        kind="sft",
        default=RolloutConfig().prompts_per_step,
    ),
)


def take_renamed(values: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Removes renamed keys from a configuration.

    Args:
        values: Nested values as files and overrides have them.
        kind: Their ``algorithm.kind``.

    Returns:
        The remaining values, and a line for every key that was removed: its value and its new place.
    """
    left, problems = dict(values), []
    for key in RENAMED_KEYS:
        section, _, name = key.old.partition(".")
        inside = left.get(section)
        if key.kind not in (None, kind) or not isinstance(inside, dict) or name not in inside:
            continue
        value = inside[name]
        left[section] = {other: each for other, each in inside.items() if other != name}
        if key.kind is None:
            problems.append(f"{key.old} = {value!r}: moved; it is {key.new} now")
        elif value != key.default:
            problems.append(
                f"{key.old} = {value!r}: has no effect with algorithm.kind = {key.kind}; it is {key.new} now"
            )
    return left, problems
