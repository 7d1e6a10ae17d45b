"""Evaluates a model: avg@k, cons@k and pass@k of every data set, with intervals.

python -m fipo_megatron.evaluate CONFIG.yaml [key=value ...]

The model is the Hugging Face directory model.path; with evaluation.checkpoint=DIR a Megatron checkpoint; with
rollout.servers.urls=[...] the model that these SGLang servers serve. Results: run.output/evaluation-NAME/.
Exit code 0: the evaluation is complete; 1: it failed; 2: the configuration, or an input that it names, is invalid.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from fipo_megatron.config import Config, ModelConfig, load_config
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.evaluation import evaluation_summary as summary
from fipo_megatron.evaluation.answering import Response, evaluate
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from fipo_megatron.evaluation.results import Evaluation
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.rollout.engine import EngineError, RequestError
from fipo_megatron.rollout.engine_factory import HostInfo, open_engine
from fipo_megatron.rollout.host_address import LOOPBACK, host_address
from fipo_megatron.rollout.sglang.gpu_placement import VISIBLE, place_servers
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.storage.output_lock import lock_output
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger("fipo_megatron")
EXPECTED = (EngineError, RequestError, VerifierError, WeightsError, OSError)
"""Expected failures: logged without a traceback, exit code 1."""
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


@contextmanager
def model_directory(config: Config, inputs: EvaluationInputs) -> Iterator[Path]:
    """Yields the model as a Hugging Face directory. A converted checkpoint is removed at the end of the block.

    Raises:
        WeightsError: The checkpoint is damaged or does not fit; see :func:`.actor.hf_conversion.megatron_to_hf`.
        OSError: The converted model cannot be written.
    """
    if config.evaluation.checkpoint is None:
        yield inputs.companions
        return
    target = inputs.output / "hf.temporary"
    for leftover in (target, partial_of(target)):  # of an evaluation that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s to %s, which is removed at the end", config.evaluation.checkpoint, target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of Megatron-Core on import
            from fipo_megatron.actor.hf_conversion import Options, megatron_to_hf

            megatron_to_hf(Path(config.evaluation.checkpoint), target, Options(), inputs.companions)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


async def cancel_on_sigterm(work: Coroutine[Any, Any, Evaluation]) -> Evaluation:
    """Awaits the result. SIGTERM cancels the work, as Ctrl-C does, so that it ends the processes it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


async def sample_and_count(config: Config, inputs: EvaluationInputs, directory: Path) -> Evaluation:
    """Opens an engine with the model in the directory, or with the configured servers, evaluates and closes it.

    Raises:
        EngineError: The engine does not start, fails, or serves another model.
    """
    servers = replace(config.rollout.servers, colocated=False)  # no actor shares the memory
    config = replace(config, model=ModelConfig(str(directory)), rollout=replace(config.rollout, servers=servers))
    coordinator, starters = (StoreCoordinator(dist.HashStore(), 0) for _ in range(2))
    host = _host(config, inputs.output)
    verifier = open_verifier(config.reward)
    try:
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
                ProgressLog(len(inputs.problems) * config.evaluation.samples_per_prompt),
            )
        finally:
            await opened.close()
    finally:
        await verifier.close()


def _host(config: Config, output: Path) -> HostInfo:
    """Returns this host, on which servers have all GPUs to themselves."""
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


def settings(config: Config) -> dict[str, Any]:
    """Returns the model and the sampling settings, for the summary."""
    served = config.rollout.engine == "sglang" and config.rollout.servers.urls
    return {
        "model": config.model.path,
        "checkpoint": config.evaluation.checkpoint,
        "servers": list(config.rollout.servers.urls) if served else [],
        "files": list(config.evaluation.files),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "temperature": config.evaluation.temperature,
        "top_p": config.evaluation.top_p,
        "max_response_tokens": config.rollout.max_response_tokens,
        "verifier": config.reward.verifier,
        "truncated_is_wrong": config.reward.truncated_is_wrong,
        "engine": config.rollout.engine,
        "seed": config.seed,
    }


def main(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for name in ("megatron", "nvidia", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no hints here
    try:
        config = load_config(arguments[0], arguments[1:])
        inputs = read_evaluation_inputs(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM removes temporary files, too
    try:
        with lock_output(inputs.output):
            with model_directory(config, inputs) as directory:
                evaluation = asyncio.run(cancel_on_sigterm(sample_and_count(config, inputs, directory)))
            summary.write(inputs.output, evaluation, settings(config))
    except EXPECTED as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        logger.error("interrupted; there is no result")
        return 1
    print(f"\n{summary.table(evaluation)}\n\n{inputs.output}/{summary.SUMMARY}, {summary.PROBLEMS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
