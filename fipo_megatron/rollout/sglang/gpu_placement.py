"""The GPUs of the servers that a run starts: their numbers, and that the trainer's ranks do not use them.

GPUs are compared by their names in ``CUDA_VISIBLE_DEVICES``; without that variable the name of a GPU is its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fipo_megatron.config.rollout_sections import RolloutConfig
from fipo_megatron.rollout.engine import EngineError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class RankGpu:
    """The GPU of a rank of the trainer.

    Attributes:
        index: Number of the GPU among those that the rank sees.
        count: Number of GPUs that the rank sees.
        visible: ``CUDA_VISIBLE_DEVICES`` of the rank; None if it is not set.
    """

    index: int
    count: int
    visible: str | None = None

    @property
    def name(self) -> str:
        """Name of the GPU on its host."""
        return str(self.index) if self.visible is None else _names(self.visible)[self.index]


@dataclass(frozen=True)
class ServerGpus:
    """The GPUs of the servers of a host.

    Attributes:
        first: ``base_gpu_id`` of each server, among the GPUs that servers see.
        visible: ``CUDA_VISIBLE_DEVICES`` of the servers; None if they see all GPUs of the host.
    """

    first: tuple[int, ...]
    visible: str | None = None


def place_servers(rollout: RolloutConfig, ranks: Sequence[RankGpu], visible: str | None = None) -> ServerGpus:
    """Chooses the GPUs of the servers of a host.

    Servers take ``rollout.sglang.tp_size`` GPUs each, one server after the other, from ``rollout.sglang.base_gpu_id``.
    Its default is the first GPU after those of the trainer's ranks; for colocated servers it is 0.

    Args:
        rollout: Section of the configuration.
        ranks: GPUs of the trainer's ranks on this host; empty if the trainer uses none.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process, for a host without ranks.

    Raises:
        EngineError: The host does not have these GPUs, or the trainer's ranks use some of them and
            ``rollout.servers.colocated`` is false.
    """
    servers, given = rollout.servers, rollout.sglang
    environment: Mapping[str, str] = servers.environment
    visible = environment.get(VISIBLE, _visible(ranks, colocated=servers.colocated) if ranks else visible)
    names = None if visible is None else _names(visible)
    used = _used(ranks, names, colocated=servers.colocated)
    size, step = _number(given, "tp_size", 1), _number(given, "gpu_id_step", 1)
    base = _number(given, "base_gpu_id", 0 if servers.colocated else max(used, default=-1) + 1)
    first = tuple(base + number * size * step for number in range(servers.per_host))
    numbers = [start + rank * step for start in first for rank in range(size)]
    count = _count(names, ranks)
    wanted = (
        f"rollout.sglang.base_gpu_id = {base}{'' if 'base_gpu_id' in given else ' (default)'}: "
        f"rollout.servers.per_host = {servers.per_host} with rollout.sglang.tp_size = {size} "
        f"needs the GPUs {_listed(numbers)}"
    )
    advice = "leave GPUs to the servers with fewer ranks per host, give rollout.servers.urls of servers on other hosts"
    if not servers.colocated:
        advice += ", or let them take turns with rollout.servers.colocated = true"
    if count is not None and numbers[-1] >= count:
        ranks_use = f", of which the trainer's ranks use {_listed(used)}" if used else ""
        raise EngineError(f"{wanted}; servers see {_listed(range(count))}{ranks_use}; {advice}")
    shared = [number for number in numbers if number in used]
    if shared and not servers.colocated:
        raise EngineError(
            f"{wanted}, but the trainer's ranks use {_listed(used)}: {_listed(shared)} would be shared; {advice}"
        )
    return ServerGpus(first, visible)


def _visible(ranks: Sequence[RankGpu], *, colocated: bool) -> str | None:
    """Returns what servers see of the host.

    If all ranks see the same GPUs, servers see these. If the launcher has given each rank its own, colocated servers
    see those of all ranks, and others see the whole host.
    """
    lists = dict.fromkeys(rank.visible for rank in ranks)
    if len(lists) == 1:
        return next(iter(lists))
    return ",".join(dict.fromkeys(rank.name for rank in ranks)) if colocated else None


def _count(names: Sequence[str] | None, ranks: Sequence[RankGpu]) -> int | None:
    """Returns the number of GPUs that servers see; None if it is not known here."""
    if names is not None:
        return len(names)
    return next((rank.count for rank in ranks if rank.visible is None), None)


def _names(visible: str) -> list[str]:
    return [name.strip() for name in visible.split(",") if name.strip()]


def _used(ranks: Sequence[RankGpu], names: Sequence[str] | None, *, colocated: bool) -> list[int]:
    """Returns the numbers under which servers see the GPUs of the ranks."""
    trainer = [rank.name for rank in ranks]
    if names is not None:
        return sorted({names.index(name) for name in trainer if name in names})
    if not colocated and not all(map(str.isdecimal, trainer)):
        raise EngineError(
            f"rollout.servers.environment.{VISIBLE}: not set, and the trainer's ranks use {', '.join(trainer)}; set it "
            "to the names of the servers' GPUs"
        )
    return sorted({int(name) for name in trainer if name.isdecimal()})


def _number(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    least = 0 if name == "base_gpu_id" else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EngineError(f"rollout.sglang.{name} = {value!r}: must be a whole number of at least {least}")
    return value


def _listed(numbers: Sequence[int]) -> str:
    """Returns numbers as text, for example ``0-3`` or ``0, 2, 4``."""
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"
