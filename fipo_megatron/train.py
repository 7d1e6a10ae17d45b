"""Trains a policy with FIPO, DAPO or GRPO, or fine-tunes it on examples (SFT).

fipo train CONFIG.yaml [key=value ...]
torchrun --nproc-per-node 8 -m fipo_megatron.train CONFIG.yaml [key=value ...]

Every rank runs this program. Exit code 0: the run is complete, or was asked to end (SIGTERM, SIGUSR1, Ctrl-C) and is
saved; 1: it failed; 2: the configuration, or an input that it names, is not valid; 3: the collapse alarm has ended the
run, which is saved. Run it again to resume. torchrun itself exits with 1 in all cases but a complete run; the file
outcome.json in run.output says how the run has ended.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.data.batch import Batch, build_batch, build_sft_batch, compute_advantages
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.observe.collapse_alarm import Alarm

# torch, transformers and Megatron take seconds to import: functions import them, so that a typo is reported before.
if TYPE_CHECKING:
    from fipo_megatron.actor.update_metrics import NoiseFloor, UpdateMetrics
    from fipo_megatron.data.packing import MiniBatch
    from fipo_megatron.rollout.sampler import SampledGroups
    from fipo_megatron.trainer.trainer import Trainer

logger = logging.getLogger("fipo_megatron")


def train(trainer: Trainer) -> bool:
    """Runs the remaining steps of FIPO, DAPO or GRPO. One turn of the loop is one step.

    Returns:
        Whether the run is complete; False if it was asked to end.
    """
    from fipo_megatron.rollout.scatter import scatter_trajectories

    config, actor = trainer.config, trainer.actor
    assert trainer.routes is not None
    while trainer.step < config.run.steps:
        trainer.timer.start()
        trainer.profiler.begin(trainer.step)
        sampled = sample_and_score(trainer)
        groups = compute_advantages(sampled.groups, config.algorithm)  # groups that this rank sampled
        batch = build_batch(sampled.records, config, trainer.step)  # names and lengths of all ranks' trajectories
        plan = actor.plan(batch.lengths, batch.mini_batches)  # packed micro-batches of each mini-batch
        trajectories = scatter_trajectories(trainer.routes, groups, batch.names, plan)
        noise_floor: NoiseFloor | None = None
        updates: list[UpdateMetrics] = []
        if plan and not config.run.rollout_only:
            with trainer.timer.part("log_probs"):
                noise_floor = trainer.lr_zero_gate.check(trainer.step, plan[0], trajectories)
                # The first update begins at π_old: its own pass gives the log-probs of π_old.
                old = [None, *actor.log_probs(plan[1:], trajectories)]
                reference = actor.reference_log_probs(plan, trajectories) if config.algorithm.kl_coef else None
            with trainer.timer.part("update"):
                traced = trainer.reporter.traced(sampled.records, batch, trainer.step)
                # Future-KL weights, the policy loss (algorithm/policy_loss.py) and one optimizer step per mini-batch.
                updates = actor.update(plan, trajectories, old, reference, traced)
        metrics = trainer.reporter.metrics(trainer.step, sampled, updates, noise_floor, trainer.probe_shift)
        health, alarm = trainer.collapse_monitor.check(trainer.step, metrics)
        metrics |= health | trainer.reporter.moments(trainer.scorer)
        trainer.reporter.write(trainer.step, metrics, sampled, groups, batch, updates)
        if not finish_step(trainer, alarm, sampled, batch, plan, updates):
            return False
    finish_run(trainer)
    return True


def sample_and_score(trainer: Trainer) -> SampledGroups:
    """Syncs the weights, evaluates if due, and samples the groups of the step; each response is scored as it finishes.

    With ``rollout.overlap``, the groups were prefetched during the step before. What was sampled survives an error.
    """
    from fipo_megatron.rollout import rollout_dump
    from fipo_megatron.rollout.engine import EngineError
    from fipo_megatron.rollout.sampler import SamplingExhaustedError

    config, session, step = trainer.config, trainer.session, trainer.step
    if session is None:  # run.replay
        return rollout_dump.read(Path(str(config.run.replay)), step, keep=trainer.layout.rank == 0)
    sampled: SampledGroups | None = None
    try:
        if session.has_prefetched:
            with trainer.timer.part("generate"), trainer.show_sampling():
                sampled = session.take_prefetched()
        with ExitStack() as serving:
            with trainer.timer.part("sync"):
                serving.enter_context(session.serving_weights(version=step))
            if trainer.is_due(config.run.evaluate_every):
                trainer.evaluate()
            if sampled is None:
                with trainer.timer.part("generate"), trainer.show_sampling():
                    sampled = session.sample(trainer.prompts)
            if config.rollout.overlap and step + 1 < config.run.steps:
                session.prefetch(trainer.prompts)
    except (EngineError, SamplingExhaustedError, VerifierError) as error:
        trainer.save_interrupted(sampled, error)
        raise
    if config.run.record_rollouts and session.engine is not None:
        rollout_dump.write(trainer.output / "rollouts", step, trainer.layout.rank, sampled)
    return sampled


def sft(trainer: Trainer) -> bool:
    """Runs the remaining steps of supervised fine-tuning; returns whether the run is complete."""
    config, actor = trainer.config, trainer.actor
    while trainer.step < config.run.steps:
        trainer.timer.start()
        trainer.profiler.begin(trainer.step)
        examples = trainer.sft_examples()
        batch = build_sft_batch(examples, config, trainer.step)
        plan = actor.plan(batch.lengths, batch.mini_batches)
        with trainer.timer.part("update"):
            updates = actor.update(plan, examples, None)
        metrics = trainer.reporter.metrics(trainer.step, None, updates, None)
        health, alarm = trainer.collapse_monitor.check(trainer.step, metrics)
        trainer.reporter.write(trainer.step, metrics | health, None, [], batch, updates)
        if not finish_step(trainer, alarm, None, batch, plan, updates):
            return False
    finish_run(trainer)
    return True


def finish_step(
    trainer: Trainer,
    alarm: Alarm | None,
    sampled: SampledGroups | None,
    batch: Batch,
    plan: Sequence[MiniBatch],
    updates: Sequence[UpdateMetrics],
) -> bool:
    """Rolls back after an alarm, else saves and exports if due; returns whether the run goes on.

    Raises:
        CollapseError: The alarm has ended the run, which is saved.
    """
    config, step = trainer.config, trainer.step
    trainer.step += 1
    stopped, alarm = trainer.agree_on_end(alarm)
    rolled_back, advice = trainer.roll_back(alarm) if alarm is not None else (False, "")
    if rolled_back:
        if stopped:
            logger.warning("ended after a return to step %d, as asked; run it again to go on", trainer.step)
        return not stopped
    is_last = trainer.step == config.run.steps
    if stopped or alarm is not None or is_last or trainer.is_due(config.checkpoint.save_every):
        with trainer.timer.part("save"):
            trainer.save()
    reward_seconds = trainer.scorer.take_seconds() if trainer.scorer is not None else None
    trainer.reporter.write_timing(step, sampled, batch, plan, updates, reward_seconds)
    trainer.profiler.end()
    if alarm is not None:
        trainer.checkpoints.finish()
        raise trainer.collapse_monitor.collapse_error(alarm, advice, is_last=is_last)
    if stopped:
        trainer.checkpoints.finish()
        logger.warning("ended after step %d, as asked; run it again to go on", step)
        return False
    if trainer.is_due(config.checkpoint.export_every) and not is_last:
        trainer.export(f"hf-{trainer.step:06}")
    return True


def finish_run(trainer: Trainer) -> None:
    """Evaluates the final policy and exports it as a Hugging Face model."""
    trainer.checkpoints.finish()
    if trainer.session is not None and trainer.config.run.evaluate_every:
        with trainer.log.phase("evaluate", trainer.step), trainer.session.serving_weights(version=trainer.step):
            trainer.evaluate()
    trainer.export("hf")


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    from fipo_megatron.trainer.program import run_program

    return run_program(arguments, lambda trainer: (sft if trainer.config.algorithm.kind == "sft" else train)(trainer))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
