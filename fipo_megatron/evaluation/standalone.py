"""An evaluation of its own, outside a run: the engine is opened for it, and progress is logged."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fipo_megatron.config import Config, ModelConfig
from fipo_megatron.evaluation.answering import Response, ResponseCallback, evaluate
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.results import Evaluation
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine_factory import HostInfo, OpenedEngine, open_engine
from fipo_megatron.rollout.host_address import LOOPBACK, host_address
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, place_servers
from fipo_megatron.rollout.store_coordinator import StoreCoordinator

logger = logging.getLogger("fipo_megatron")
_PROGRESS_SECONDS = 10.0


class ProgressLog:
    """Logs the progress of an evaluation at intervals.

    Args:
        total: Number of responses of the evaluation.
        seconds: Seconds between two lines.
    """

    def __init__(self, total: int, seconds: float = _PROGRESS_SECONDS) -> None:
        self._total, self._seconds = total, seconds
        self._done = self._right = self._tokens = 0
        self._start = self._last = time.monotonic()

    def __call__(self, response: Response) -> None:
        """Counts a response and logs a line if one is due."""
        self._done += 1
        self._right += response.right
        self._tokens += response.tokens
        now = time.monotonic()
        if now - self._last >= self._seconds or self._done == self._total:
            self._last = now
            logger.info(
                "%d of %d responses, %.1f %% right, %.0f tokens/s",
                self._done,
                self._total,
                100 * self._right / self._done,
                self._tokens / max(now - self._start, 1e-3),
            )


async def sample_and_count(
    config: Config,
    inputs: EvaluationInputs,
    directory: Path,
    keep: ResponseCallback = lambda response: None,
    embedded: Callable[[Path], EmbeddedEngine] | None = None,
) -> Evaluation:
    """Opens an engine with the model in the directory, or with the configured servers, evaluates and closes it.

    Args:
        config: Configuration of the evaluation.
        inputs: Its inputs.
        directory: Hugging Face directory of the model.
        keep: Callback for each checked response.
        embedded: Opens an embedded engine with the model in a directory; None: the configured engine.

    Raises:
        EngineError: The engine does not start, fails, or serves another model.
    """
    servers = replace(config.rollout.servers, colocated=False)  # no actor shares the memory
    config = replace(config, model=ModelConfig(str(directory)), rollout=replace(config.rollout, servers=servers))
    coordinator, starters = (StoreCoordinator(dist.HashStore(), 0) for _ in range(2))
    host = only_host(config, inputs.output)
    verifier = open_verifier(config.reward)
    progress = ProgressLog(len(inputs.problems) * config.evaluation.samples_per_prompt)

    def report(response: Response) -> None:
        keep(response)
        progress(response)

    try:
        if embedded is not None:
            opened = OpenedEngine(embedded(directory))
        else:
            opened = await open_engine(config, host, coordinator, starters, inputs.tokenizer, inputs.architecture.vocab)
        try:
            for server in opened.facts:
                logger.info("%s: SGLang %s, weight version %d", server.url, server.version, server.weight_version)
            return await evaluate(
                inputs.problems,
                opened.engine,
                coordinator,
                ResponseScorer(config, verifier, inputs.tokenizer),
                config,
                inputs.stop_token_ids,
                report,
            )
        finally:
            await opened.close()
    finally:
        await verifier.close()


def only_host(config: Config, output: Path) -> HostInfo:
    """Returns this host, on which servers have all GPUs to themselves.

    Args:
        config: Configuration of the program.
        output: Directory for the logs of servers.
    """
    cuda, servers = torch.cuda.is_available(), config.rollout.servers
    return HostInfo(
        rank=0,
        local_rank=0,
        starters=(0,),
        cuda=cuda,
        directory=output,
        address=host_address(servers.interface) if servers.interface else LOOPBACK,
        gpus=place_servers(config.rollout, (), os.environ.get(VISIBLE)) if cuda and not servers.urls else None,
    )
