"""The program of every rank around the steps: inputs, the trainer, errors that are told once, and the exit code."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from fipo_megatron.actor.launch import Launch
from fipo_megatron.config import load_config, notices
from fipo_megatron.observe.collapse_alarm import CollapseError
from fipo_megatron.rollout.engine import EngineError

# torch, transformers and Megatron take seconds to import: functions import them, so that a typo is reported before.
if TYPE_CHECKING:
    import torch.distributed as dist
    from rich.console import Console

    from fipo_megatron.config import Config
    from fipo_megatron.trainer.outcome import Outcome
    from fipo_megatron.trainer.rank_monitor import RankMonitor
    from fipo_megatron.trainer.trainer import Trainer
    from fipo_megatron.trainer.training_inputs import TrainingInputs

    Inputs = tuple[Config, TrainingInputs, Console | None]

logger = logging.getLogger("fipo_megatron")
FAILED, NOT_VALID, COLLAPSED = 1, 2, 3
"""Exit codes: the run has failed; the configuration or an input is not valid; the collapse alarm has ended the run."""

_CONNECTION_LOST = ("onnection closed", "onnection reset", "roken pipe", "remote process exited")
"""Parts of the messages of gloo and NCCL about a rank that has ended."""


def run_program(arguments: Sequence[str], run: Callable[[Trainer], bool]) -> int:
    """Reads the inputs, opens the trainer, runs the steps, and returns the exit code.

    On several ranks, the first error of any rank is told once, with its rank and host, and ends the run on all ranks
    with the same exit code.

    Args:
        arguments: Path of the configuration, and overrides.
        run: Function that runs the remaining steps; returns whether the run is complete.
    """
    from fipo_megatron.trainer.rank_monitor import RankMonitor

    try:
        launch = Launch.from_environment(os.environ)
    except ValueError as error:
        _print(str(error))
        return NOT_VALID
    with ExitStack() as watched:
        try:
            monitor = watched.enter_context(RankMonitor(launch, lambda: _connect(launch)))
        except OSError as error:
            _log(f"{type(error).__name__}: {error}")
            return FAILED
        try:
            inputs = _read_inputs(arguments, launch, monitor)
        except ValueError as error:
            monitor.report(str(error), NOT_VALID, _print)
            return NOT_VALID
        except EngineError as error:
            monitor.report(f"EngineError: {error}", FAILED, _log, error)
            return FAILED
        return _train(inputs, run, monitor)


def _connect(launch: Launch) -> dist.Store:
    from fipo_megatron.actor.parallel import connect

    return connect(launch)


def _read_inputs(arguments: Sequence[str], launch: Launch, monitor: RankMonitor) -> Inputs:
    """Reads and checks the configuration and the inputs; sets up logging.

    Raises:
        ValueError: Something is not valid.
        EngineError: Running servers do not serve the model.
    """
    config = load_config(arguments[0], arguments[1:])
    monitor.silence_seconds, monitor.hang_seconds = config.rollout.silence_seconds, config.run.hang_seconds
    from fipo_megatron.observe.console import set_up_logging, silence_libraries
    from fipo_megatron.trainer.memory_check import check_memory
    from fipo_megatron.trainer.training_inputs import check_megatron_options, read_training_inputs

    silence_libraries()
    console = set_up_logging(launch.rank, plain=config.observe.plain_console)
    inputs = read_training_inputs(config)
    check_megatron_options(config, inputs.architecture)
    check_memory(config, inputs.architecture, launch)
    for notice in notices(config):
        logger.info("note: %s", notice)
    return config, inputs, console


def _train(inputs: Inputs, run: Callable[[Trainer], bool], monitor: RankMonitor) -> int:
    """Opens the trainer, runs the steps, tells an error before anything is closed, and returns the exit code."""
    from fipo_megatron.trainer.factory import EXPECTED, open_trainer
    from fipo_megatron.trainer.outcome import write_outcome

    trainer: Trainer | None = None
    try:
        with ExitStack() as opened:
            try:
                trainer = opened.enter_context(open_trainer(*inputs))
                opened.enter_context(_objects_out_of_collections())
                complete = run(trainer)
            except Exception as error:
                code = _report(error, monitor)
                if trainer is not None and trainer.layout.rank == 0:
                    outcome: Outcome = "collapsed" if code == COLLAPSED else "failed"
                    write_outcome(trainer.output, outcome, trainer.step, FAILED if code is None else code)
                if code is None:
                    raise
                return code
            if trainer.layout.rank == 0:
                write_outcome(trainer.output, "complete" if complete else "stopped", trainer.step, 0)
    except EXPECTED as error:  # while something was closed
        monitor.report(f"{type(error).__name__}: {error}", FAILED, _log, error)
        return FAILED
    return 0


@contextmanager
def _objects_out_of_collections() -> Iterator[None]:
    """Opens a block in which garbage collections leave out the objects that exist now.

    Those of imports and of the start are half a million. A full collection that walks over them stops a rank for 0.25 s
    while the others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _report(error: Exception, monitor: RankMonitor) -> int | None:
    """Tells an error of a run and returns its exit code; returns None for one that is not expected."""
    from fipo_megatron.actor.collectives import OtherRankError
    from fipo_megatron.rollout.engine import LostRankError
    from fipo_megatron.trainer.factory import EXPECTED

    text, code = f"{type(error).__name__}: {error}", FAILED
    silent = isinstance(error, LostRankError)
    if silent:
        monitor.wait_for_cause()  # it names a rank that is stopped, and kills it
    if isinstance(error, CollapseError):
        text, code = str(error), COLLAPSED
    elif isinstance(error, OtherRankError):
        text = str(error)
    elif not isinstance(error, EXPECTED):
        if isinstance(error, RuntimeError):
            monitor.wait_for_cause()  # another rank may have ended
        if not any(part in str(error) for part in _CONNECTION_LOST):
            monitor.report_unexpected(error)
            return None
        text = f"the connection to another rank is lost; the output of that rank says why: {error}"
    monitor.report(text, code, _log, error, hangs=silent)
    return code


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _log(text: str) -> None:
    logger.error("%s", text)
