"""Opens a trainer: process groups, actor, checkpoints, logs, resume, and the rollout side."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import broadcast_from_first_rank, raise_on_all_ranks
from fipo_megatron.actor.finite_weights import check_finite
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.actor.update_metrics import NoiseError, UpdatesSkippedError
from fipo_megatron.checkpoint.manager import CheckpointManager, Restored
from fipo_megatron.config import Config
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.data.prompts import PromptStream
from fipo_megatron.observe.profiling import StepProfiler
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.rollout.engine import EngineError, LostRankError
from fipo_megatron.rollout.engine_factory import HostInfo
from fipo_megatron.rollout.sampler import SamplingExhaustedError
from fipo_megatron.rollout.scatter import Routes
from fipo_megatron.rollout.weight_sync.probe import RESPONSES
from fipo_megatron.storage import checksums
from fipo_megatron.storage.output_lock import OutputInUseError, lock_output
from fipo_megatron.trainer.collapse_monitor import CollapseMonitor
from fipo_megatron.trainer.hosts import describe_host
from fipo_megatron.trainer.lr_zero_gate import LrZeroGate
from fipo_megatron.trainer.outcome import remove_outcome
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.trainer.stacks import stacks_to_file
from fipo_megatron.trainer.step_reporter import StepReporter
from fipo_megatron.trainer.step_timer import StepTimer
from fipo_megatron.trainer.trainer import Trainer
from fipo_megatron.trainer.training_inputs import TrainingInputs
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger(__name__)
EXPECTED = (
    *(EngineError, LostRankError, SamplingExhaustedError, VerifierError, NoiseError, UpdatesSkippedError),
    *(WeightsError, OSError),
)
"""Expected failures of a run: logged without a traceback, exit code 1."""


def open_trainer(config: Config, inputs: TrainingInputs, console: Console | None = None) -> Trainer:
    """Opens a trainer on this rank and resumes from the newest checkpoint. A collective of all ranks.

    If anything fails on the way, everything that was opened is closed again.

    Args:
        config: Configuration of the run.
        inputs: Inputs of the run.
        console: Terminal of the first rank; None if there is none.

    Raises:
        EngineError: The rollout engine does not start, or serves another model.
        OSError: The port of rank 0 is in use, or the output cannot be written or is in use by another process.
        WeightsError: The model or every checkpoint is damaged.
    """
    with ExitStack() as resources:
        layout = parallel.initialize(config.actor.parallel, config.seed)
        resources.callback(parallel.destroy)
        _lock_output(Path(config.run.output), layout, resources)
        resources.enter_context(stacks_to_file(Path(config.run.output), layout.rank))
        samples = config.algorithm.kind != "sft" and not config.run.replay
        host = describe_host(config, layout) if samples else None
        trainer = _build(config, inputs, console, layout, resources)
        restored = _resume(trainer)
        if host is not None:
            _open_rollouts(trainer, host, restored, resources)
        elif config.run.replay:
            trainer.routes = Routes.build(layout.data_rank)
        resources.enter_context(trainer.stop)
        trainer.resources = resources.pop_all()
    trainer.log.started(trainer.step)
    return trainer


def _lock_output(output: Path, layout: RankLayout, resources: ExitStack) -> None:
    """Lets rank 0 hold the lock of the output directory until the trainer is closed. A collective of all ranks.

    Raises:
        OutputInUseError: Another process writes into the directory; on all ranks.
    """
    problem = ""
    with raise_on_all_ranks("opening the output directory"):
        if layout.rank == 0:
            try:
                resources.enter_context(lock_output(output))
                remove_outcome(output)
            except OutputInUseError as error:
                problem = str(error)
    if problem := broadcast_from_first_rank(problem, layout.device):
        raise OutputInUseError(problem)


def _build(
    config: Config, inputs: TrainingInputs, console: Console | None, layout: RankLayout, resources: ExitStack
) -> Trainer:
    """Builds all parts of a trainer but the rollout side."""
    output = Path(config.run.output)
    actor = MegatronActor(
        config,
        inputs.architecture,
        layout,
        lambda chunks: load_hf(chunks, inputs.architecture, layout, config.model.path),
    )
    check_finite(actor.chunks, inputs.architecture, layout, f"model.path = {config.model.path}")
    if config.algorithm.kl_coef:
        actor.keep_reference()
    files = {file: checksums.digest(Path(file)) for file in config.data.files} if layout.rank == 0 else {}
    checkpoints = CheckpointManager(output / "checkpoints", config, actor, inputs.architecture, files)
    resources.callback(checkpoints.close)
    log = RunLog(config, writes=layout.rank == 0)
    resources.callback(log.close)
    timer = StepTimer()
    profiled = config.run.profile if layout.rank == 0 or config.run.profile_ranks == "all" else ()
    profiler = StepProfiler(profiled, output / "profile", layout.rank)
    profiler.pause_with(checkpoints.paused)
    resources.callback(profiler.close)
    return Trainer(
        config=config,
        inputs=inputs,
        layout=layout,
        actor=actor,
        prompts=PromptStream(inputs.prompts, config.seed, config.data.epochs, shuffle=config.data.shuffle),
        checkpoints=checkpoints,
        log=log,
        collapse_monitor=CollapseMonitor(config.health, output, checkpoints, log, layout),
        timer=timer,
        profiler=profiler,
        reporter=StepReporter(config, inputs, layout, log, timer),
        lr_zero_gate=LrZeroGate(actor, config.run.noise_floor_every),
        console=console,
    )


def _resume(trainer: Trainer) -> Restored | None:
    """Restores the newest whole checkpoint, if there is one and ``checkpoint.resume`` allows it."""
    path, restored = None, None
    if trainer.config.checkpoint.resume == "auto":
        trainer.collapse_monitor.set_aside_collapsed()
        path, restored = _restore_newest(trainer)
    trainer.collapse_monitor.forget_later_rollbacks()
    trainer.log.open(trainer.step)
    trainer.collapse_monitor.restore()
    if path is not None:
        logger.info("goes on from %s", path)
    return restored


def _restore_newest(trainer: Trainer) -> tuple[Path | None, Restored | None]:
    """Restores the newest checkpoint that can be loaded; sets others aside. None if there is no checkpoint.

    Raises:
        WeightsError: There are checkpoints, but none can be loaded.
    """
    failure: WeightsError | None = None
    while (path := trainer.checkpoints.newest()) is not None:
        try:
            return path, trainer.restore(path)
        except WeightsError as error:
            trainer.checkpoints.set_aside(path, error)
            failure = error
    if failure is not None:
        raise WeightsError(f"{trainer.checkpoints.directory}: no checkpoint can be loaded; the last error:\n{failure}")
    return None, None


def _open_rollouts(trainer: Trainer, host: HostInfo, restored: Restored | None, resources: ExitStack) -> None:
    """Opens verifier, scorer, engine and sampler, and restores what they carried over."""
    config, inputs = trainer.config, trainer.inputs
    verifier = open_verifier(config.reward)
    trainer.scorer = ResponseScorer(config, verifier, inputs.tokenizer)
    session = trainer.session = RolloutSession(
        config,
        trainer.actor,
        inputs.architecture,
        host,
        parallel.store(),
        tokenizer=inputs.tokenizer,
        scorer=trainer.scorer,
        stop_token_ids=inputs.stop_token_ids,
        probe=inputs.prompts[:RESPONSES],
    )
    trainer.routes = session.routes
    trainer.profiler.pause_with(session.paused)
    resources.callback(session.close)
    resources.callback(lambda: session.run(verifier.close()))
    resources.callback(session.cancel_prefetch)
    if restored is not None:
        session.restore(trainer.step, restored.carry_over, restored.prefetched)
