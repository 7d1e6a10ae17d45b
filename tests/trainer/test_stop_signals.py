"""Signals that ask a run to end after its step."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from fipo_megatron.trainer.stop_signals import HANDLED, StopSignals
from tests.processes import ROOT


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_a_request(number, caplog):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before
    assert f"{number.name}: the run ends after this step; once more ends it at once" in caplog.text
    assert "torchrun" not in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("environment", "code"),
    [({}, 128 + signal.SIGTERM), ({"TORCHELASTIC_RUN_ID": "none"}, 0), ({"SLURM_STEP_ID": "0"}, 0)],
)
def test_a_second_signal_ends_the_process_unless_torchrun_or_srun_has_passed_it_on(environment, code):
    program = (
        "import os, signal\n"
        "from fipo_megatron.trainer.stop_signals import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean | environment, check=False)
    assert done.returncode == code


def test_a_step_that_torchrun_would_not_wait_for_is_told_once(caplog, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "90")
    stop = StopSignals()
    with caplog.at_level(logging.WARNING):
        stop.check_time(89.0)
        assert not caplog.text
        for _ in range(2):
            stop.check_time(140.0)
    assert caplog.text.count("a step takes 140 s, and torchrun kills its ranks 90 s after a signal") == 1


def test_without_torchrun_a_step_may_take_any_time(caplog, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    StopSignals().check_time(1e6)
    assert not caplog.text
