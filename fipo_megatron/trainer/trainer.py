"""A run on one rank: actor, rollout side, place in the data, and what it writes; opened and closed as a whole."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.collectives import raise_on_all_ranks
from fipo_megatron.actor.hf_weights import load_hf, save_hf
from fipo_megatron.actor.update_metrics import NoiseError, NoiseFloor, UpdateMetrics
from fipo_megatron.checkpoint.manager import CheckpointManager, TrainState
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.config import Config
from fipo_megatron.data.batch import Batch, build_batch, compute_advantages
from fipo_megatron.data.packing import MiniBatch, split_mini_batches
from fipo_megatron.data.prompts import PromptStream
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.evaluation.answering import evaluate
from fipo_megatron.evaluation.results import Evaluation
from fipo_megatron.observe.collapse_alarm import Alarm, CollapseAlarm, CollapseError
from fipo_megatron.observe.console import show_sampling_progress
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import Verifier, open_verifier
from fipo_megatron.rollout import rollout_dump
from fipo_megatron.rollout.carry_over import Carried
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.engine_factory import HostInfo
from fipo_megatron.rollout.sampler import SampledGroups, SamplingExhaustedError
from fipo_megatron.rollout.scatter import Routes, scatter_trajectories
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.testing import fail_points
from fipo_megatron.trainer import rollback
from fipo_megatron.trainer.rollback import Rollback
from fipo_megatron.trainer.rollout_session import RolloutSession
from fipo_megatron.trainer.step_reporter import StepReporter
from fipo_megatron.trainer.training_inputs import TrainingInputs, sft_example
from fipo_megatron.weights.hf_directory import WeightsError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Run:
    """What a run has on this rank. A context manager: everything that was started ends with the block.

    Args:
        config: Of the run.
        inputs: What it reads.
        console: The terminal, on the first rank; None where there is none.

    Attributes:
        config: Of the run.
        actor: The policy.
        first_step: The step that this process began with.
    """

    def __init__(self, config: Config, inputs: TrainingInputs, console: Console | None = None) -> None:
        self.config, self._inputs, self._console = config, inputs, console
        self._output = Path(config.run.output)
        self._complete = False
        self._seconds: Counter[str] = Counter()
        self._stack = ExitStack()
        self._launch = parallel.Launch.from_environment(os.environ)
        self._layout = parallel.initialize(config.actor.parallel, config.seed)
        self._stack.callback(parallel.destroy)
        self._output.mkdir(parents=True, exist_ok=True)
        self.actor = MegatronActor(
            config,
            inputs.architecture,
            self._layout,
            lambda chunks: load_hf(chunks, inputs.architecture, self._layout, config.model.path),
        )
        if config.algorithm.kl_coef:
            self.actor.keep_reference()
        self._checkpoints = CheckpointManager(self._output / "checkpoints", config, self.actor, inputs.architecture)
        self._stack.callback(self._checkpoints.close)
        self._stream = PromptStream(inputs.prompts, config.seed, config.data.epochs, shuffle=config.data.shuffle)
        self._log = RunLog(config, writes=self._layout.rank == 0)
        self._stack.callback(self._log.close)
        self._reporting = StepReporter(config, inputs, self._layout)
        self._alarm = CollapseAlarm(config.health)
        self._raised: Alarm | None = None
        self._noise: NoiseFloor | None = None
        self._passes_agree = False
        self._rates: Callable[[Mapping[str, float]], dict[str, float | None]] | None = None
        self._verifier: Verifier | None = None
        self._session: RolloutSession | None = None
        self._ahead: SampledGroups | None = None
        self.first_step = self._saved = self._step = 0
        self._roll_backs = self._stop = 0
        self._returned_to: int | None = None
        carried = self._resume()
        self._routes: Routes | None = None
        if config.run.replay:
            self._routes = Routes.build(self._layout.data_rank)
        elif config.algorithm.kind != "sft":
            self._open_rollouts(carried)
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._stack.callback(signal.signal, signum, signal.signal(signum, self._on_signal))

    def _resume(self) -> list[Carried]:
        """Goes on from the newest checkpoint, where there is one; what its samplers carried."""
        events: list[Rollback] = []
        if self.config.checkpoint.resume == "auto":
            with raise_on_all_ranks("looking for checkpoints"):
                if self._layout.rank == 0:
                    events = rollback.read(self._output)
                    rollback.set_aside_collapsed(self._checkpoints.directory, events)
        path = self._checkpoints.newest() if self.config.checkpoint.resume == "auto" else None
        carried = [] if path is None else self._load(path, self._from_first_rank(events))
        self.first_step = self._step
        if self._layout.rank == 0 and events[self._roll_backs :]:  # of a checkpoint that is there no more
            rollback.write(self._output, events[: self._roll_backs])
        self._log.open(self._step)
        self._alarm.restore(self._from_first_rank(self._log.seen()))
        if path is not None:
            logger.info("goes on from %s", path)
        return carried

    def _load(self, path: Path, events: Sequence[Rollback]) -> list[Carried]:
        """Takes a checkpoint over; where the run has returned to it from later, it does not do the same again."""
        saved, carried, self._ahead = self._checkpoints.load(path)
        self._step = self._saved = saved.step
        self._stream.given, self._roll_backs = saved.cursor, saved.roll_backs
        self.actor.learning_rate_factor = saved.learning_rate_factor
        returned = events[: self._roll_backs]
        if (event := rollback.pending(events, saved)) is not None:
            self._stream.given, self._roll_backs = event.cursor, event.number
            self.actor.learning_rate_factor = event.learning_rate_factor
            self._ahead, carried, returned = None, [], [event]
        self._returned_to = returned[-1].to if returned else None
        return carried

    def _from_first_rank(self, value: T) -> T:
        message = [value]
        dist.broadcast_object_list(message, src=0, device=self._layout.device)
        return message[0]

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The first ends the run after this step, saved; the second at once."""
        if self._stop:
            os._exit(128 + signum)
        self._stop = signum
        logger.warning("%s: the run ends after this step; once more ends it at once", signal.Signals(signum).name)

    def _open_rollouts(self, carried: list[Carried]) -> None:
        self._verifier = open_verifier(self.config.reward)
        self._scoring = ResponseScorer(self.config, self._verifier, self._inputs.tokenizer)
        self._session = RolloutSession(
            self.config,
            self.actor,
            self._inputs.architecture,
            self._host(),
            parallel.store(),
            tokenizer=self._inputs.tokenizer,
            scorer=self._scoring,
            stop_token_ids=self._inputs.stop_token_ids,
            probe=self._inputs.prompts[0],
        )
        self._stack.callback(self._session.close)
        self._session.restore(carried)
        if self._ahead is not None:
            self._session.restore_prefetched(self._ahead)
        self._stack.callback(lambda: self._session and self._verifier and self._session.wait(self._verifier.close()))
        self._stack.callback(self._session.abandon)

    def _host(self) -> HostInfo:
        everyone: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, self._launch.local_rank)
        directory = self._output / "rollout"
        directory.mkdir(exist_ok=True)
        return HostInfo(
            rank=self._layout.rank,
            local_rank=self._launch.local_rank,
            starters=tuple(rank for rank, local in enumerate(everyone) if local == 0),
            cuda=self._layout.device.type == "cuda",
            directory=directory,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def steps(self) -> Iterator[int]:
        """The steps that are left; saves after each where it is time to, and where the run is asked to end.

        Raises:
            CollapseError: the alarm has ended the run, saved.
        """
        self._step = self.first_step
        while self._step < self.config.run.steps:
            step, start = self._step, time.perf_counter()
            yield step
            self._step += 1
            stopped, raised = self._agree()
            every = self.config.checkpoint.save_every
            if raised is not None and not (advice := self._answer(raised)):
                if stopped:
                    logger.warning("ended after a return to step %d, as asked; run it again to go on", self._step)
                    return
                continue
            last = self._step == self.config.run.steps
            if stopped or raised is not None or last or (every and self._step % every == 0):
                with self.part("save"):
                    self._save(self._step)
            self._seconds["step"] = time.perf_counter() - start
            self._log_timing(step)
            if raised is not None:
                self._checkpoints.finish()
                more = " Either needs a larger run.steps: this was the last step." if last else ""
                raise CollapseError(
                    f"the run has collapsed: {raised.reason}. It is saved: run again with health.action=warn, it goes "
                    f"on all the same. {advice}.{more}"
                )
            if stopped:
                self._checkpoints.finish()
                logger.warning("ended after step %d, as asked; run it again to go on", step)
                return
            every = self.config.checkpoint.export_every
            if every and self._step % every == 0 and not last:
                self._export(self._output / f"hf-{self._step:06}")
        self._checkpoints.finish()
        self._complete = True

    def _agree(self) -> tuple[bool, Alarm | None]:
        """Whether any rank was asked to end, and the alarm, where it is more than a warning.

        Where all have written a checkpoint, what went wrong with it is raised.
        """
        raised = self._raised if self.config.health.action != "warn" else None
        self._raised = None
        flags = torch.tensor([self._stop > 0, self._checkpoints.is_writing, raised is not None], dtype=torch.int32)
        flags = flags.to(self._layout.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stopped, writing, alarmed = flags.tolist()
        if not writing:
            self._checkpoints.finish()
        return bool(stopped), self._from_first_rank(raised) if alarmed else None

    def _answer(self, alarm: Alarm) -> str:
        """Returns to a checkpoint from before, where that is asked for and can be done; all ranks are here.

        Returns:
            Where it has not: what can be done about it.
        """
        advice = self._return_from(alarm)
        if advice:
            self._log.alarm(alarm, "stop")
        return advice

    def _return_from(self, alarm: Alarm) -> str:
        """See :meth:`_answer`."""
        health, until = self.config.health, self._sound_until(alarm.began)
        if health.action != "roll_back":
            return (
                f"With health.action=roll_back it returns to the checkpoint of step {until} or before, where there is "
                "one, if the next window is no better"
            )
        if self._roll_backs >= health.max_roll_backs:
            return (
                f"It has returned {self._roll_backs} times: with health.max_roll_backs={self._roll_backs + 1} it "
                "returns once more, if the next window is no better"
            )
        self._checkpoints.finish()
        path = None
        with suppress(WeightsError):  # none is whole; which are not is said
            path = self._checkpoints.newest(until=until)
        if path is None:
            return f"It cannot return: there is no whole checkpoint of step {until} or before"
        if self._session is not None:
            with suppress(EngineError, SamplingExhaustedError):
                self._session.take_prefetched()
            self._session.drop_carried()
        to = Manifest.read(path).step
        with raise_on_all_ranks("returning to an earlier checkpoint"):
            if self._layout.rank == 0:
                event = Rollback(
                    number=self._roll_backs + 1,
                    step=alarm.step,
                    to=to,
                    cursor=self._stream.given,
                    learning_rate_factor=self.actor.learning_rate_factor * health.roll_back_lr,
                    reason=alarm.reason,
                )
                events = [*rollback.read(self._output)[: self._roll_backs], event]
                rollback.write(self._output, events)
                rollback.set_aside_collapsed(self._checkpoints.directory, events)
        self._load(path, self._from_first_rank(rollback.read(self._output)))
        self._alarm.restore(one for one in self._alarm.history if one[0] < to)
        self._log.close()
        self._log.open(to)
        self._seconds.clear()
        logger.error("returned to %s; the learning rate is times %g", path, self.actor.learning_rate_factor)
        return ""

    def _sound_until(self, safe: int) -> int:
        """What the run has returned to is taken for sound, also where the window reaches further back."""
        return safe if self._returned_to is None else max(safe, self._returned_to)

    def _log_timing(self, step: int) -> None:
        if self._session is not None:
            self._seconds["reward"] = self._scoring.take_seconds()
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._log.timing(step, seconds, self._rates(seconds) if self._rates is not None else {})
        self._rates = None

    def _save(self, step: int) -> None:
        carried, ahead = None, None
        if self._session is not None:
            with suppress(EngineError, SamplingExhaustedError):  # raised again where the next step needs it
                ahead = self._session.wait_prefetched()
            carried = self._session.carried()
        scores = self._log.evaluations() if self.config.checkpoint.keep_best else {}
        place = TrainState(step, self._stream.given, self._roll_backs, self.actor.learning_rate_factor)
        safe = None if self._alarm.safe is None else self._sound_until(self._alarm.safe)
        self._checkpoints.save(place, carried, ahead, scores, safe)
        self._saved = step

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step whose time is taken."""
        fail_points.reach(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def sample(self, step: int) -> SampledGroups:
        """The groups of a step, from an engine with the actor's weights; evaluates first where it is time to."""
        if self.config.run.replay:
            return rollout_dump.read(Path(self.config.run.replay), step, keep=self._layout.rank == 0)
        assert self._session is not None
        sampled = None
        try:
            sampled = self._taken_ahead()
            with ExitStack() as generating:
                with self.part("sync"):
                    generating.enter_context(self._session.generating(step))
                every = self.config.run.evaluate_every
                if every and step % every == 0:
                    self._evaluate(step)
                if sampled is None:
                    with self.part("generate"), self._shown():
                        sampled = self._session.sample(self._stream)
                if self.config.rollout.overlap and step + 1 < self.config.run.steps:
                    self._session.prefetch(self._stream)
        except (EngineError, SamplingExhaustedError):
            if sampled is not None:
                self._session.restore_prefetched(sampled)
            self._rescue(step)
            raise
        if self.config.run.record_rollouts and self._session.engine is not None:
            rollout_dump.write(self._output / "rollouts", step, self._layout.rank, sampled)
        return sampled

    def _shown(self) -> AbstractContextManager[None]:
        """On the first rank, people see how far sampling is."""
        assert self._session is not None
        return show_sampling_progress(self._console, self._session.progress if self._layout.rank == 0 else None)

    def _taken_ahead(self) -> SampledGroups | None:
        """What was sampled while the step before was learned from; None where that is still to be done."""
        assert self._session is not None
        if not self.config.rollout.overlap:
            return None
        with self.part("generate"), self._shown():
            try:
                return self._session.take_prefetched()
            except EngineError as error:
                logger.warning("%s\nthis step is sampled anew, with its own weights", error)
                return None

    def _rescue(self, step: int) -> None:
        """Saves what was sampled of a step that cannot be finished; all ranks are here."""
        if step > self._saved:
            self._save(step)
            self._checkpoints.finish()
            logger.error("what was sampled so far is in the checkpoint of step %d; run it again to go on", step)

    def _evaluate(self, step: int) -> Evaluation:
        assert self._session is not None
        with self.part("evaluate"):
            found = self._session.wait(
                evaluate(
                    self._inputs.problems,
                    self._session.engine,
                    self._session.coordinator,
                    self._scoring,
                    self.config,
                    self._inputs.stop_token_ids,
                )
            )
        self._scoring.take_seconds()
        self._log.evaluation(step, found)
        return found

    def batch(self, sampled: SampledGroups, step: int) -> Batch:
        """The step's trajectories, numbered."""
        return build_batch(sampled.records, self.config, step)

    def scatter_trajectories(
        self, sampled: SampledGroups, batch: Batch, plan: Sequence[MiniBatch]
    ) -> Mapping[int, Trajectory]:
        """What this rank trains on, with advantages."""
        routes = self._session.routes if self._session is not None else self._routes
        assert routes is not None
        return scatter_trajectories(
            routes, compute_advantages(sampled.groups, self.config.algorithm), batch.names, plan
        )

    def examples(self) -> list[Trajectory]:
        """Returns the next SFT examples, the same on every rank."""
        prompts = self._stream(self.config.sft.examples_per_step)
        longest = self.config.rollout.max_response_tokens
        return [sft_example(prompt, self._inputs.tokenizer, longest) for prompt in prompts]

    def batch_of_examples(self, examples: Sequence[Trajectory], step: int) -> Batch:
        """Each example is a group of its own."""
        mini_batches = split_mini_batches(
            [1] * len(examples), self.config.actor.prompts_per_mini_batch, seed=(self.config.seed << 32) + step
        )
        return Batch(tuple(t.name for t in examples), tuple(len(t) for t in examples), tuple(map(tuple, mini_batches)))

    def watched(self, sampled: SampledGroups, batch: Batch, step: int) -> frozenset[int]:
        """Trajectories whose tokens are wanted for the trajectory file."""
        return self._reporting.watched(sampled, batch, step)

    def check_noise_floor(self, step: int, mini_batch: MiniBatch, trajectories: Mapping[int, Trajectory]) -> None:
        """The lr = 0 gate, until a process has passed it once; later what is to be reported of it.

        Raises:
            NoiseError: the passes of this process do not agree.
        """
        every = self.config.run.noise_floor_every
        reported = bool(every) and step % every == 0
        if self._passes_agree and not reported:
            return
        try:
            floor = self.actor.check_noise_floor(mini_batch, trajectories, warm_up=not self._passes_agree)
        except NoiseError as error:
            if not self._passes_agree:
                raise
            logger.warning("%s", error)
            floor = error.floor
        self._passes_agree = self._passes_agree or floor is not None
        self._noise = floor if reported else None

    def log(self, step: int, sampled: SampledGroups | None, batch: Batch, updates: Sequence[UpdateMetrics]) -> None:
        """Writes what a step did, and looks whether it is well."""
        values = self._reporting.values(step, sampled, updates, self._noise)
        self._noise = None
        report, self._raised = self._alarm.look(step, values)
        if self._raised is not None:
            logger.error("ALARM in step %d: %s", step, self._raised.reason)
            if self.config.health.action == "warn":
                self._log.alarm(self._raised, "warn")
        with self.part("observe"):
            kept, shown = self._reporting.rows(step, sampled, batch, updates)
        self._log.step(step, values | report, sampled, updates, kept, shown)
        self._rates = partial(self._reporting.rates, sampled, batch, updates)

    def export(self) -> None:
        """After the last step: evaluates a last time, and writes the policy as a Hugging Face model."""
        if not self._complete:
            return
        steps = self.config.run.steps
        if self._session is not None and self.config.run.evaluate_every:
            with self._session.generating(steps):
                self._evaluate(steps)
        self._export(self._output / "hf")

    def _export(self, target: Path) -> None:
        with raise_on_all_ranks("removing an earlier export"):
            if self._layout.rank == 0:
                for path in (target, partial_of(target)):
                    shutil.rmtree(path, ignore_errors=True)
        save_hf(self.actor.chunks, self._inputs.architecture, self._layout, self.config.model.path, target)
        logger.info("the policy is in %s", target)
