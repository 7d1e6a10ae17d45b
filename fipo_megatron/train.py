"""Trains a policy: sample, score, compare, update.

torchrun --nproc-per-node 8 -m fipo_megatron.train CONFIG.yaml [key=value ...]

Every rank runs this loop. Exit code 2: the configuration, or what it names, is not valid; 1: the run failed; 3: the
alarm for collapse has ended it, saved; 0: it is complete, or was asked to end (SIGTERM, Ctrl-C) and is saved. Run it
again to go on.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import transformers

from fipo_megatron.config import Config, load_config, notices
from fipo_megatron.observe.collapse_alarm import CollapseError
from fipo_megatron.observe.console import set_up_logging
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sampler import SamplingExhaustedError
from fipo_megatron.trainer.training_inputs import read_training_inputs
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError

if TYPE_CHECKING:
    from fipo_megatron.trainer.trainer import Run

logger = logging.getLogger("fipo_megatron")
EXPECTED = (EngineError, SamplingExhaustedError, WeightsError, OSError)
"""What may happen to a run that is as it should be; its text says all there is to say."""


def train(run: Run) -> None:
    """The steps that are left."""
    config, actor = run.config, run.actor
    for step in run.steps():
        sampled = run.sample(step)
        batch = run.batch(sampled, step)
        plan = actor.plan(batch.lengths, batch.mini_batches)
        trajectories = run.scatter_trajectories(sampled, batch, plan)
        if config.run.rollout_only or not plan:
            run.log(step, sampled, batch, [])
            continue
        with run.part("log_probs"):
            run.check_noise_floor(step, plan[0], trajectories)
            old = actor.log_probs(plan, trajectories)
            reference = actor.reference_log_probs(plan, trajectories) if config.algorithm.kl_coef else None
        with run.part("update"):
            updates = actor.update(plan, trajectories, old, reference, run.watched(sampled, batch, step))
        run.log(step, sampled, batch, updates)


def sft(run: Run) -> None:
    """The steps that are left of ``algorithm.kind = sft``: examples instead of samples."""
    for step in run.steps():
        examples = run.examples()
        batch = run.batch_of_examples(examples, step)
        plan = run.actor.plan(batch.lengths, batch.mini_batches)
        with run.part("update"):
            updates = run.actor.update(plan, examples, None)
        run.log(step, None, batch, updates)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    _hush()
    try:
        config = load_config(arguments[0], arguments[1:])
        console = set_up_logging(rank, plain=config.observe.plain_console)
        inputs = read_training_inputs(config)
        check_options(config, inputs.architecture)
    except ValueError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    for notice in notices(config):
        logger.info("note: %s", notice)
    from fipo_megatron.actor.update_metrics import NoiseError
    from fipo_megatron.trainer.trainer import Run

    try:
        with Run(config, inputs, console) as run:
            sft(run) if config.algorithm.kind == "sft" else train(run)
            run.export()
    except CollapseError as error:
        logger.error("%s", error)
        return 3
    except (*EXPECTED, NoiseError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def check_options(config: Config, architecture: Architecture) -> None:
    """Raises ValueError for options of Megatron's that it does not know, or that do not go together."""
    from fipo_megatron.actor import megatron_config  # Megatron takes seconds to import; a typo elsewhere should not

    megatron_config.check(architecture, config.actor)
    megatron_config.check_auxiliary_losses(config)


def _hush() -> None:
    """What libraries say of their own state; warnings of ours and errors stay."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    for name in ("megatron", "nvidia", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
