"""Silence counts only while this process runs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fipo_megatron.rollout.silence_timer import SilenceTimer
from tests.processes import ROOT

PROGRAM = """
import time
from fipo_megatron.rollout.silence_timer import SilenceTimer
timer, start = SilenceTimer(), time.monotonic()
print("started", flush=True)
while time.monotonic() - start < 6:
    time.sleep(0.02)
    timer.seconds()
print(timer.seconds(), time.monotonic() - start)
"""


def test_a_sign_of_life_starts_again():
    timer = SilenceTimer()
    time.sleep(0.2)
    assert timer.seconds() >= 0.2
    before = timer.seconds()
    timer.heard()
    assert timer.seconds() < before


@pytest.mark.processes
def test_time_in_which_the_process_was_suspended_does_not_count():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(process.pid, signal.SIGCONT)
    silent, all_seconds = map(float, process.communicate()[0].split())
    assert silent <= all_seconds - 5 + 2 + 0.1
