"""Seconds and peak memory of the actor's passes over synthetic trajectories of one length; needs no engine."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fipo_megatron.actor.actor import MegatronActor, StoredLogProbs
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import LocalMicroBatch, local_micro_batches
from fipo_megatron.algorithm.future_kl import Exchange, future_kl, gather_over
from fipo_megatron.algorithm.policy_loss import LARGEST_EXPONENT, LossInputs, future_kl_weight, policy_loss
from fipo_megatron.data.packing import MiniBatch
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.plan.memory_count import measure
from fipo_megatron.plan.rank_kinds import rank_kinds
from fipo_megatron.plan.rank_memory import RankMemory
from fipo_megatron.stress.limits import GIB
from fipo_megatron.stress.stress_settings import StressSettings

_REPEATS = 5
_SHIFT = 1e-3
"""Size of the made-up log-prob shifts; the time does not depend on it."""


@dataclass(frozen=True)
class PassPeaks:
    """Peak memory of a rank in bytes, weights, gradients and optimizer state included.

    Attributes:
        kept: Weights, gradients and optimizer state.
        log_probs: Peak of the log-prob pass.
        update: Peak of forward and backward passes and of the optimizer step.
    """

    kept: int
    log_probs: int
    update: int

    @classmethod
    def of(cls, memory: RankMemory) -> PassPeaks:
        """Returns the peaks of a memory count."""
        step = max(memory.update.peak, memory.optimizer_step.peak)
        return cls(memory.kept, memory.kept + memory.log_probs.peak, memory.kept + step)


def synthetic_trajectories(settings: StressSettings, length: int, count: int) -> list[Trajectory]:
    """Returns trajectories of random tokens with alternating advantages, the same on every rank."""
    vocab, found = settings.architecture.vocab, []
    for number, response in enumerate(settings.response_lengths(length, count).tolist()):
        tokens = np.random.default_rng([length, number, 1]).integers(0, vocab, response).astype(np.int32)
        log_probs = np.full(response, -np.log(vocab), np.float32)
        mask = np.ones(response, np.bool_)
        advantage = 1.0 - 2.0 * (number % 2)
        prompt = settings.prompt(length, number)
        found.append(Trajectory(prompt, 0, tokens, log_probs, mask, advantage=advantage))
    return found


def measure_actor(
    actor: MegatronActor, settings: StressSettings, length: int, planned: Mapping[int, RankMemory] | None
) -> dict[str, Any]:
    """Measures log-probs, Future-KL and update of one mini-batch. A collective; changes the weights.

    Memory and seconds come from two runs of the same passes on the CPU: counting the live tensors takes time.

    Args:
        actor: Actor of this rank.
        settings: Settings of the stress run.
        length: Tokens of a sequence; :attr:`.MegatronActor.config` becomes the configuration of this length.
        planned: Planned memory of a rank, by pipeline stage; None if it could not be traced.

    Returns:
        The row of ``stress.json``, the same on every rank.
    """
    actor.config = settings.configs[length]
    layout, parallel = actor.layout, actor.config.actor.parallel
    filled = max(kind.micro_batches for kind in rank_kinds(settings.architecture, parallel, layout.world_size))
    count = (settings.options.sequences or filled) * layout.data_size
    trajectories = synthetic_trajectories(settings, length, count)
    (mini_batch,) = actor.plan([len(trajectory) for trajectory in trajectories], [range(count)])
    cuda = layout.device.type == "cuda"
    if cuda:
        _run_passes(actor, mini_batch, trajectories)  # creates the optimizer state, loads kernels
        counted = None
    else:
        counted = PassPeaks.of(measure(actor, mini_batch, trajectories))
    timed, old = _run_passes(actor, mini_batch, trajectories)
    timed["seconds"] |= _loss_seconds(actor, mini_batch, trajectories, old)
    peaks = counted or timed["allocated"]
    plan = PassPeaks.of(planned[layout.pipeline_rank]) if planned else None
    mine = {
        "rank": layout.rank,
        "stage": layout.pipeline_rank,
        "measured": vars(peaks),
        "planned": vars(plan) if plan else None,
        "plan_error": _plan_error(peaks, plan) if plan else None,
        "resident_growth": timed["resident_growth"],
        "seconds": timed["seconds"],
    }
    everyone: list[Any] = [mine] * layout.world_size
    dist.all_gather_object(everyone, mine)
    seconds = {name: max(rank["seconds"][name] for rank in everyone) for name in mine["seconds"]}
    return {
        "length": length,
        "sequences": count,
        "tokens": sum(map(len, trajectories)),
        "micro_batches": len(mini_batch.micro_batches[0]),
        "memory": "torch.cuda.max_memory_allocated" if cuda else "bytes of live tensors",
        "skipped": timed["skipped"],
        "seconds": seconds,
        "ranks": everyone,
        "metrics": _metrics(seconds, everyone),
    }


def _plan_error(peaks: PassPeaks, plan: PassPeaks) -> float:
    return max(abs(peaks.log_probs / plan.log_probs - 1), abs(peaks.update / plan.update - 1))


def _metrics(seconds: Mapping[str, float], ranks: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    passes = seconds["log_probs"] + seconds["update"]
    return {
        "log_probs_seconds": seconds["log_probs"],
        "update_seconds": seconds["update"],
        "future_kl_fraction": seconds["future_kl"] / passes,
        "loss_fraction": seconds["loss"] / passes,
        "peak_gib": max(max(rank["measured"].values()) for rank in ranks) / GIB,
        "plan_error": None if ranks[0]["plan_error"] is None else max(rank["plan_error"] for rank in ranks),
    }


def _run_passes(
    actor: MegatronActor, mini_batch: MiniBatch, trajectories: Sequence[Trajectory]
) -> tuple[dict[str, Any], StoredLogProbs]:
    """Runs a log-prob pass and the first update of a step.

    Returns:
        Seconds and peaks of this rank, and the log-probs.
    """
    gc.collect()
    cuda = actor.layout.device.type == "cuda"
    resident = ResidentMemory()
    kept = torch.cuda.memory_allocated() if cuda else 0
    old, first, first_peak = _timed(lambda: actor.log_probs([mini_batch], trajectories), cuda)
    (metrics,), second, second_peak = _timed(lambda: actor.update([mini_batch], trajectories, [None]), cuda)
    found = {
        "seconds": {"log_probs": first, "update": second},
        "allocated": PassPeaks(kept, first_peak, second_peak),
        "resident_growth": resident.growth(),
        "skipped": metrics.skipped,
    }
    return found, old


def _timed(work: Callable[[], Any], cuda: bool) -> tuple[Any, float, int]:
    """Runs a collective from a common start; returns its result, its seconds and, on CUDA, the peak of the memory."""
    dist.barrier()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0


class ResidentMemory:
    """The peak resident memory of this process since the object was created, as Linux counts it."""

    def __init__(self) -> None:
        with suppress(OSError, AttributeError):  # glibc keeps freed memory, which would hide what is allocated next
            ctypes.CDLL(None).malloc_trim(0)
        self._start = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._reset = True
        except OSError:
            self._reset = False

    def growth(self) -> int | None:
        """Returns the peak above the start in bytes; None where the kernel does not tell."""
        return _resident("VmHWM") - self._start if self._reset else None


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def _loss_seconds(
    actor: MegatronActor, mini_batch: MiniBatch, trajectories: Sequence[Trajectory], old: StoredLogProbs
) -> dict[str, float]:
    """Returns the seconds of Future-KL with its weights, and of the whole loss with its backward pass.

    Both are medians over some repeats, summed over the micro-batches; 0 on pipeline stages before the last.
    """
    layout = actor.layout
    members = mini_batch.micro_batches[layout.data_rank]
    micros = local_micro_batches(members, trajectories, layout, token_multiple=actor.token_multiple)
    exchange = gather_over(parallel_state.get_context_parallel_group())
    seconds = {"future_kl": 0.0, "loss": 0.0}
    for micro, stored in zip(micros, old[0], strict=True):
        if stored is not None:
            inputs = _loss_inputs(micro, stored)
            seconds["future_kl"] += _median_seconds(lambda: _weights(actor, inputs, exchange), layout.device)  # noqa: B023
            seconds["loss"] += _median_seconds(lambda: _loss(actor, inputs, exchange), layout.device)  # noqa: B023
    return seconds


def _loss_inputs(micro: LocalMicroBatch, stored: TokenLogProbs) -> LossInputs:
    generator = torch.Generator(stored.log_probs.device).manual_seed(0)
    shift = torch.randn(stored.log_probs.shape, generator=generator, device=stored.log_probs.device)
    return LossInputs(
        log_probs=stored.log_probs + _SHIFT * shift,
        old_log_probs=stored.log_probs,
        advantages=micro.advantages,
        mask=micro.mask,
        shards=micro.shards,
        behaviour_log_probs=micro.behaviour_log_probs,
        entropy=stored.entropy,
    )


def _weights(actor: MegatronActor, inputs: LossInputs, exchange: Exchange) -> None:
    algorithm = actor.config.algorithm
    shift_T = torch.where(inputs.mask, inputs.log_probs - inputs.old_log_probs, 0.0)
    found_T = future_kl(shift_T, algorithm.half_life, inputs.shards, exchange)
    future_kl_weight(found_T.clamp(max=LARGEST_EXPONENT).exp(), shift_T.exp(), inputs.advantages, algorithm)


def _loss(actor: MegatronActor, inputs: LossInputs, exchange: Exchange) -> None:
    algorithm = replace(actor.config.algorithm, kl_coef=0.0)  # there is no reference policy
    inputs = replace(inputs, log_probs=inputs.log_probs.detach().requires_grad_())
    policy_loss(inputs, algorithm, exchange).numerator.backward()  # type: ignore[no-untyped-call]


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    found = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])  # the first one warms up
