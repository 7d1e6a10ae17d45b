"""Trains on every rank; one rank has other arguments, or a fault that it meets while it trains."""

import os
import time

import fipo_megatron.train
from fipo_megatron.rollout.sampler import Sampler
from fipo_megatron.trainer.step_reporter import StepReporter


def main(rank, fault, *arguments):
    """Calls the program; ``fault`` is an override, or the name of a function of this module."""
    if int(os.environ["RANK"]) == rank:
        if "=" in fault:
            arguments = (*arguments, fault)
        else:
            globals()[fault]()
    return fipo_megatron.train.main(arguments)


def fails_unexpectedly():
    """Raises an error after the update, as a fault of the program would."""

    def metrics(*arguments):
        raise TypeError("a fault of the program")

    StepReporter.metrics = metrics


def blocks_its_event_loop():
    """Blocks the event loop in step 1, and so the heartbeat of the sampler, while the process lives."""
    sample = Sampler.step

    async def step(self, next_prompts, version):
        if version:
            time.sleep(600)
        return await sample(self, next_prompts, version)

    Sampler.step = step
