"""A profile ends while other threads compute: PyTorch itself does not survive that (see StepProfiler.pause_with)."""

import asyncio
import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from fipo_megatron.observe.profiling import StepProfiler
from fipo_megatron.rollout.event_loop import EventLoopThread
from tests.processes import run_ranks

STEPS = 40


async def compute():
    matrix = torch.ones(8, 8)
    while True:
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix)
        await asyncio.sleep(0)


async def several_turns():
    for _ in range(3):
        await asyncio.sleep(0)


def main(directory):
    """Profiles steps in a process of its own, which a fault would end."""
    loop = EventLoopThread()
    work = loop.begin(compute())
    profiler = StepProfiler(range(STEPS), Path(directory), rank=0)
    profiler.pause_with(loop.paused)
    for step in range(STEPS):
        profiler.begin(step)
        loop.run(several_turns())
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.end() if step == STEPS - 1 else profiler.close()
    assert not work.done()
    loop.close()
    profiler.begin(0)
    profiler.close()  # a thread that has ended needs no pause


@pytest.mark.processes
def test_a_profile_ends_while_another_thread_computes(tmp_path):
    done = run_ranks("tests.observe.test_profiling", tmp_path, ranks=None)
    assert done.code == 0, done.output
    with gzip.open(tmp_path / f"step-{STEPS - 1:06}-rank-0000.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert len({event["tid"] for event in events if event["name"] == "aten::mm"}) == 2


def test_a_pause_that_is_interrupted_leaves_the_thread_running(monkeypatch):
    loop = EventLoopThread()
    waits = threading.Event.wait

    def interrupted(event, timeout=None):
        if timeout is not None:
            raise KeyboardInterrupt
        return waits(event)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.paused().__enter__()
    assert loop.run(asyncio.sleep(0, "done")) == "done"
    with loop.paused():
        late = loop.begin(asyncio.sleep(0, "late"))
        with pytest.raises(TimeoutError):
            late.result(timeout=0.2)
    assert late.result(timeout=10) == "late"
    loop.close()
