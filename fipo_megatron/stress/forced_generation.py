"""Responses of forced length from the configured engine: no stop tokens, so that every response has its length."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed as dist

from fipo_megatron.data.trajectory import Prompt, Trajectory
from fipo_megatron.evaluation.standalone import only_host
from fipo_megatron.rollout.engine import (
    EngineError,
    GenerationRequest,
    RequestError,
    RolloutEngine,
    SamplingParameters,
    sampling_seed,
)
from fipo_megatron.rollout.engine_factory import open_engine
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.stress.server_load import Interval, LoadMonitor, seconds_by_position
from fipo_megatron.stress.stress_settings import StressSettings

Report = Callable[[str], None]
"""Callback that shows a line of progress."""

_REPORT_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class ForcedResponse:
    """A response that was asked for.

    Attributes:
        asked: Number of tokens that were asked for.
        tokens: Number of tokens that were sampled.
        seconds: Seconds from the start of all responses to the end of this one.
        retractions: Times that the engine discarded its KV cache and read it again.
        trajectory: The response; None if it failed.
        failure: Reason of a failure; empty if there is none.
    """

    asked: int
    tokens: int
    seconds: float
    retractions: int
    trajectory: Trajectory | None
    failure: str = ""


@dataclass(frozen=True, eq=False)
class ForcedGeneration:
    """The responses of one length.

    Attributes:
        row: The row of ``stress.json``.
        trajectories: Responses that did not fail.
    """

    row: dict[str, Any]
    trajectories: tuple[Trajectory, ...]


@asynccontextmanager
async def opened_engine(settings: StressSettings) -> AsyncIterator[RolloutEngine]:
    """Opens the configured engine: running servers, servers of its own on all GPUs of this host, or the embedded one.

    Raises:
        EngineError: The engine does not start, cannot be reached, or serves another model.
    """
    config = settings.longest
    servers = replace(config.rollout.servers, colocated=False)  # the actor is built after the engine has been closed
    config = replace(config, rollout=replace(config.rollout, servers=servers))
    coordinator, starters = (StoreCoordinator(dist.HashStore(), 0) for _ in range(2))
    assert settings.tokenizer is not None
    opened = await open_engine(
        config,
        only_host(config, settings.output),
        coordinator,
        starters,
        settings.tokenizer,
        settings.architecture.vocab,
    )
    try:
        assert opened.engine is not None
        yield opened.engine
    finally:
        await opened.close()


async def force_responses(
    engine: RolloutEngine, settings: StressSettings, length: int, report: Report
) -> ForcedGeneration:
    """Samples all responses of one length at the same time; a failure of one is recorded and ends no other.

    Args:
        engine: The engine.
        settings: Settings of the stress run.
        length: Tokens of a prompt and its longest response.
        report: Callback for lines of progress.
    """
    asked = settings.response_lengths(length, settings.options.responses).tolist()
    monitor = LoadMonitor(engine) if isinstance(engine, SglangClient) else None
    losses = engine.losses if isinstance(engine, SglangClient) else 0
    start = time.monotonic()
    async with monitor or nullcontext():
        tasks = [
            asyncio.create_task(_force(engine, settings, settings.prompt(length, number), tokens, start))
            for number, tokens in enumerate(asked)
        ]
        try:
            await _until_done(tasks, lambda done: report(_progress(length, done, len(asked), start, monitor)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    responses = [task.result() for task in tasks]
    if isinstance(engine, SglangClient):
        losses = engine.losses - losses
    return ForcedGeneration(
        _row(settings, length, responses, losses, monitor),
        tuple(response.trajectory for response in responses if response.trajectory is not None),
    )


async def _until_done(tasks: Sequence[asyncio.Task[ForcedResponse]], report: Callable[[int], None]) -> None:
    pending: set[asyncio.Task[ForcedResponse]] = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, timeout=_REPORT_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if pending:
            report(len(tasks) - len(pending))


def _progress(length: int, done: int, count: int, start: float, monitor: LoadMonitor | None) -> str:
    text = f"engine: {length:,} tokens: {done} of {count} responses after {time.monotonic() - start:.0f} s"
    if monitor is not None and monitor.samples:
        last = monitor.samples[-1]
        text += f"; {last.running} run, {last.used:,} of {last.capacity:,} tokens in the KV cache"
    return text


async def _force(
    engine: RolloutEngine, settings: StressSettings, prompt: Prompt, asked: int, start: float
) -> ForcedResponse:
    rollout = settings.longest.rollout
    # Without stop tokens, the embedded engine ends at the limit only, and SGLang is told to ignore its own.
    sampling = SamplingParameters(rollout.temperature, asked, rollout.top_p)
    seed = sampling_seed(settings.longest.seed, prompt.id, 0, 0)
    try:
        found = await engine.generate(GenerationRequest(prompt.id, prompt.id, prompt.tokens, sampling, seed))
    except (EngineError, RequestError) as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ForcedResponse(asked, 0, time.monotonic() - start, 0, None, failure)
    seconds, tokens, trajectory, failure = time.monotonic() - start, len(found.tokens), None, ""
    if found.finish_reason == "abort":
        failure = f"aborted after {tokens} tokens"
    elif tokens != asked or found.finish_reason != "length":
        failure = f"ended by {found.finish_reason} after {tokens} of {asked} tokens"
    else:
        try:
            mask = np.ones(tokens, np.bool_)
            trajectory = Trajectory(
                prompt, 0, found.tokens, found.log_probs, mask, found.spans, "length", advantage=1.0
            )
        except ValueError as error:
            failure = str(error)
    return ForcedResponse(asked, tokens, seconds, found.retractions, trajectory, failure)


def _row(
    settings: StressSettings,
    length: int,
    responses: Sequence[ForcedResponse],
    losses: int,
    monitor: LoadMonitor | None,
) -> dict[str, Any]:
    """Returns the row of ``stress.json``."""
    seconds = max(response.seconds for response in responses)
    tokens = sum(response.tokens for response in responses)
    failures = Counter(response.failure for response in responses if response.failure)
    retractions = sum(response.retractions for response in responses)
    kv = monitor.summary() if monitor else None
    intervals = monitor.intervals(settings.options.prompt_tokens) if monitor else _growth(settings, responses)
    return {
        "length": length,
        "responses": len(responses),
        "response_tokens": [response.asked for response in responses],
        "tokens": tokens,
        "failures": [{"reason": reason, "count": count} for reason, count in failures.most_common()],
        "lost_servers": losses,
        "kv_cache": kv,
        "kv_cache_problem": monitor.problem if monitor and kv is None else "",
        "seconds_by_position": seconds_by_position(intervals, max(response.asked for response in responses)),
        "metrics": {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "failures": sum(failures.values()),
            "retractions": retractions,
            "kv_usage": kv["peak_usage"] if kv else None,
        },
    }


def _growth(settings: StressSettings, responses: Sequence[ForcedResponse]) -> list[Interval]:
    """Returns the times between the ends of responses of different lengths, if all of them were sampled at once."""
    if len(responses) > settings.longest.rollout.embedded_slots:
        return []
    ends: dict[int, float] = {0: 0.0}
    for response in responses:
        if not response.failure:
            ends[response.asked] = max(response.seconds, ends.get(response.asked, 0.0))
    ordered = sorted(ends.items())
    return [Interval(start, end, after - before) for (start, before), (end, after) in pairwise(ordered)]
