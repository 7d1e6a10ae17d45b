"""Trains on every rank; one rank has other arguments, or a fault that it meets while it trains."""

import os
import time

import fipo_megatron.train
from fipo_megatron.rollout.group_sampler import GroupSampler
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
    """Blocks the event loop, and so the heartbeat, while the process lives."""

    async def sample(self, group):
        time.sleep(600)

    GroupSampler.sample = sample
