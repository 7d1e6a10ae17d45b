"""The trainer: everything that a run has on one rank, and the steps' recurring jobs."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from rich.console import Console

from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import broadcast_from_first_rank, raise_on_all_ranks
from fipo_megatron.actor.finite_weights import check_finite
from fipo_megatron.actor.hf_weights import save_hf
from fipo_megatron.actor.parallel import RankLayout
from fipo_megatron.checkpoint.manager import CheckpointManager, Restored, TrainState
from fipo_megatron.config import Config
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.data.prompts import PromptStream
from fipo_megatron.data.tokenizer import sft_example
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.evaluation.answering import evaluate
from fipo_megatron.observe.collapse_alarm import Alarm
from fipo_megatron.observe.console import show_sampling_progress
from fipo_megatron.observe.profiling import StepProfiler
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.rollout.engine import EngineError, PermanentEngineError
from fipo_megatron.rollout.sampler import SampledGroups, SamplingExhaustedError
from fipo_megatron.rollout.scatter import Routes
from fipo_megatron.rollout.weight_sync.probe import ProbeShift
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.trainer.collapse_monitor import CollapseMonitor
from fipo_megatron.trainer.lr_zero_gate import LrZeroGate
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.trainer.step_reporter import StepReporter
from fipo_megatron.trainer.step_timer import StepTimer
from fipo_megatron.trainer.stop_signals import STOP_FILE, StopSignals
from fipo_megatron.trainer.training_inputs import TrainingInputs

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer:
    """A run on one rank; :func:`.trainer.factory.open_trainer` opens it, and its block closes everything.

    All methods are collectives of all ranks unless they say otherwise.

    Attributes:
        config: Configuration of the run.
        inputs: Inputs of the run.
        layout: Layout of this rank.
        actor: The policy.
        prompts: Training prompts in their order; its cursor is part of a checkpoint.
        checkpoints: Checkpoints of the run.
        log: Files, trackers and console lines of the run.
        collapse_monitor: Collapse alarm and rollbacks.
        timer: Timer of the step.
        profiler: Writes traces of the steps of ``run.profile``.
        reporter: Writes metrics, responses and times of each step.
        lr_zero_gate: Gate that two passes at equal weights must pass before the first update.
        session: Rollout side; None for SFT and ``run.replay``.
        scorer: Scores responses; None for SFT and ``run.replay``.
        routes: Process groups that bring trajectories to the ranks that train on them; None for SFT.
        stop: Requests to end the run.
        console: Terminal of the first rank; None if there is none.
        resources: Closes what was opened.
        step: Number of the next step.
        saved_step: Step of the last checkpoint.
    """

    config: Config
    inputs: TrainingInputs
    layout: RankLayout
    actor: MegatronActor
    prompts: PromptStream
    checkpoints: CheckpointManager
    log: RunLog
    collapse_monitor: CollapseMonitor
    timer: StepTimer
    profiler: StepProfiler
    reporter: StepReporter
    lr_zero_gate: LrZeroGate
    session: RolloutSession | None = None
    scorer: ResponseScorer | None = None
    routes: Routes | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    console: Console | None = None
    resources: ExitStack = field(default_factory=ExitStack)
    step: int = 0
    saved_step: int = 0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    @property
    def output(self) -> Path:
        """Output directory of the run."""
        return Path(self.config.run.output)

    @property
    def probe_shift(self) -> ProbeShift | None:
        """Difference of engine and actor after the weights were sent last; None without a probe."""
        return self.session.weights.probe_shift if self.session is not None else None

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps is due before :attr:`step`; 0 is never. No collective."""
        return bool(every) and self.step % every == 0

    def show_sampling(self) -> AbstractContextManager[None]:
        """Returns a block in which the first rank shows how far sampling is. No collective."""
        assert self.session is not None
        return show_sampling_progress(self.console, self.session.progress if self.layout.rank == 0 else None)

    def evaluate(self) -> None:
        """Evaluates the weights that the engine has and logs the result under :attr:`step`."""
        assert self.session is not None
        assert self.scorer is not None
        with self.timer.part("evaluate"):
            found = self.session.run(
                evaluate(
                    self.inputs.problems,
                    self.session.engine,
                    self.session.coordinator,
                    self.scorer,
                    self.config,
                    self.inputs.stop_token_ids,
                )
            )
        self.scorer.take_seconds()
        self.log.evaluation(self.step, found)

    def sft_examples(self) -> list[Trajectory]:
        """Returns the next SFT examples, the same on every rank. No collective."""
        prompts = self.prompts(self.config.sft.examples_per_step)
        longest = self.config.rollout.max_response_tokens
        return [sft_example(prompt, self.inputs.tokenizer, longest) for prompt in prompts]

    def agree_on_end(self, alarm: Alarm | None) -> tuple[bool, Alarm | None]:
        """Lets all ranks agree on whether to stop and on the alarm; raises the failure of a finished checkpoint.

        Returns:
            Whether any rank was asked to end, by a signal or :data:`.stop_signals.STOP_FILE`; and the first rank's
            alarm if any rank has one.

        Raises:
            OSError: A checkpoint could not be written in the background.
        """
        requested = self.stop.requested
        if self.layout.rank == 0:
            self.stop.check_time(self.timer.seconds()["step"])
            if (file := self.output / STOP_FILE).exists():
                requested = True
                file.unlink(missing_ok=True)
        flags = torch.tensor([requested, self.checkpoints.is_writing, alarm is not None], dtype=torch.int32)
        flags = flags.to(self.layout.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stopped, writing, alarmed = flags.tolist()
        if not writing:
            self.checkpoints.finish()
        return bool(stopped), broadcast_from_first_rank(alarm, self.layout.device) if alarmed else None

    def save(self, *, replace: bool = False) -> None:
        """Saves a checkpoint to resume with :attr:`step`; waits first until prefetching is over.

        Args:
            replace: Whether an earlier checkpoint of this step is replaced.
        """
        carried, prefetched = None, None
        if self.session is not None:
            with suppress(
                EngineError, SamplingExhaustedError, VerifierError
            ):  # raised again when the next step needs the groups
                prefetched = self.session.wait_prefetched()
            carried = self.session.carried()
        scores = self.log.evaluations() if self.config.checkpoint.keep_best else {}
        state = TrainState(
            self.step, self.prompts.given, self.collapse_monitor.rollbacks, self.actor.learning_rate_factor
        )
        self.checkpoints.save(state, carried, prefetched, scores, self.collapse_monitor.safe_step, replace=replace)
        self.saved_step = self.step

    def save_interrupted(self, sampled: SampledGroups | None, error: Exception) -> None:
        """Saves what was sampled of a step that cannot be finished, and logs how the run can go on.

        After an error that would occur again nothing is saved: the weights may be its cause.

        Args:
            sampled: Groups of the step, if sampling was complete.
            error: Reason why it cannot be finished.
        """
        if self.layout.rank == 0:
            logger.warning("step %d cannot be finished: %s", self.step, str(error).partition("\n")[0])
        if isinstance(error, PermanentEngineError):
            text = "step %d is not saved: the same error would occur again. The run would go on from step %d"
            if self.layout.rank == 0:
                logger.error(text, self.step, self.saved_step)
            return
        exhausted = isinstance(error, SamplingExhaustedError)
        if self.step == self.saved_step and not exhausted:
            return  # nothing was learned since; a rerun samples the step anew
        if sampled is not None and self.session is not None:
            self.session.put_prefetched(sampled)
        self.save(replace=True)
        self.checkpoints.finish()
        how = "run it again to go on with other prompts" if exhausted else "run it again to go on"
        if isinstance(error, SamplingExhaustedError) and error.out_of_prompts:
            end = f", or with run.steps={self.step} to end it here" if self.step else ""
            how = f"run it again with a larger data.epochs to go on{end}"
        if self.layout.rank == 0:
            logger.error("what was sampled so far is in the checkpoint of step %d; %s", self.step, how)

    def restore(self, path: Path) -> Restored:
        """Restores actor, prompts and position from a checkpoint.

        Returns:
            The rest of the checkpoint; without carry-over if the run was rolled back to it.
        """
        restored = self.checkpoints.load(path)
        state, rolled_back = self.collapse_monitor.position_after(restored.manifest)
        self.step = self.saved_step = state.step
        self.prompts.given = state.cursor
        self.actor.learning_rate_factor = state.learning_rate_factor
        return Restored(restored.manifest) if rolled_back else restored

    def roll_back(self, alarm: Alarm) -> tuple[bool, str]:
        """Rolls back to a checkpoint from before the collapse, if ``health.action`` asks for it and there is one.

        Returns:
            Whether the run was rolled back; if not, also what the user can do about the alarm.
        """
        path, advice = self.collapse_monitor.find_rollback(alarm)
        if path is None:
            self.log.alarm(alarm, "stop")
            return False, advice
        if self.session is not None:
            self.session.drop_carried()
        if self.scorer is not None:
            self.scorer.take_seconds()  # those of the step that is undone
            self.scorer.take_moments()
        self.collapse_monitor.record_rollback(alarm, path, self.prompts.given, self.actor.learning_rate_factor)
        self.restore(path)
        self.collapse_monitor.restore(self.step)
        self.log.close()
        self.log.open(self.step)
        logger.error("returned to %s; the learning rate is times %g", path, self.actor.learning_rate_factor)
        return True, ""

    def export(self, name: str) -> None:
        """Writes the policy as a Hugging Face model into a directory of the output; replaces an earlier one.

        Raises:
            WeightsError: The policy is not finite.
        """
        target = self.output / name
        check_finite(self.actor.chunks, self.inputs.architecture, self.layout, f"the policy is not written to {target}")
        with self.log.phase("export", self.step):
            with raise_on_all_ranks("removing an earlier export"):
                if self.layout.rank == 0:
                    for path in (target, partial_of(target)):
                        shutil.rmtree(path, ignore_errors=True)
            save_hf(self.actor.chunks, self.inputs.architecture, self.layout, self.config.model.path, target)
        logger.info("the policy is in %s", target)
