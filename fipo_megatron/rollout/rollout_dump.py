"""Dumps of the sampled responses of every step, on which a run can be trained again (``run.replay``)."""

from __future__ import annotations

import json
from pathlib import Path

from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Group
from fipo_megatron.rollout import carry_over
from fipo_megatron.rollout.sampler import SampledGroups
from fipo_megatron.storage.atomic import write_atomic


def write(directory: Path, step: int, rank: int, sampled: SampledGroups) -> None:
    """Writes the scored groups of this rank; replaces the dump of an earlier attempt at the step."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files(step, rank, sampled).items():
        write_atomic(directory / name, content)


def files(step: int, rank: int, sampled: SampledGroups) -> dict[str, bytes]:
    """Returns the contents of the files of this rank's dump, by name."""
    found = {f"step-{step:06}-{rank}.npz": carry_over.serialize_groups(sampled.groups)}
    if rank == 0:
        found[f"step-{step:06}.json"] = json.dumps(dict(sampled.statistics)).encode()
    return found


def read(directory: Path, step: int, *, keep: bool) -> SampledGroups:
    """Reads the groups that all ranks had sampled in a step.

    Args:
        directory: Directory of the dumps.
        step: Number of the step.
        keep: Whether this rank returns the groups; other ranks return their records only.

    Raises:
        FileNotFoundError: the directory has no dump of the step.
        ValueError: a file is damaged.
    """
    found = sorted(directory.glob(f"step-{step:06}-*.npz"), key=lambda file: int(file.stem.rpartition("-")[2]))
    if not found:
        raise FileNotFoundError(f"run.replay = {directory}: holds no rollout dump of step {step}")
    statistics = json.loads((directory / f"step-{step:06}.json").read_bytes())
    groups: list[Group] = []
    for file in found:
        try:
            groups += carry_over.deserialize_groups(file.read_bytes())[0]
        except Exception as error:  # a damaged archive raises errors of any type
            raise ValueError(f"{file}: is damaged: {error!r}") from error
    records = tuple(GroupRecord.of(group, 0) for group in groups)
    return SampledGroups(records, tuple(groups) if keep else (), statistics)
