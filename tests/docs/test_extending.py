"""The programs on docs/extending.md, as they stand there."""

import asyncio
import importlib
import json
import subprocess
import sys
import time
from urllib.request import Request, urlopen

import pytest

from fipo_megatron.config import RewardConfig
from fipo_megatron.observe.trajectory_files import cut_rows
from fipo_megatron.reward.verifier import check_verifier, open_verifier
from fipo_megatron.reward.verifier_protocol import Answer
from fipo_megatron.rollout.sglang.server import free_port
from tests.docs.pages import titled


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a program of the page to a directory from which it can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(title):
        path = tmp_path / title
        path.write_text(titled("extending.md", title), encoding="utf-8")
        importlib.invalidate_caches()
        return path

    return write


def verdicts(name, *answers):
    async def ask():
        verifier = open_verifier(RewardConfig(verifier=name, verifier_processes=1))
        try:
            return [(verdict.correct, verdict.failure) for verdict in [await verifier.verify(one) for one in answers]]
        finally:
            await verifier.close()

    return asyncio.run(ask())


def test_a_python_function(program):
    with pytest.raises(ValueError, match="there is no module 'last_number'"):
        check_verifier("python:last_number.verify")
    program("last_number.py")
    answers = Answer("so 3 + 4 = 7.", "7"), Answer("1,234", "1234"), Answer("7, or 8", "7"), Answer("none", "7")
    expected = [(True, ""), (True, ""), (False, ""), (False, "")]
    assert verdicts("python:last_number.verify", *answers) == expected
    assert verdicts("python:last_number.verify", Answer("7", "seven")) == [(False, "error")]


def test_a_service(program):
    port = free_port("127.0.0.1")
    server = subprocess.Popen([sys.executable, str(program("service.py")), str(port)])
    try:
        for _ in range(100):
            try:
                body = json.dumps({"response": "", "ground_truth": "1"}).encode()
                urlopen(Request(f"http://127.0.0.1:{port}/", body), timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        answers = Answer("Answer: 34.", "34"), Answer("Answer: 35", "34")
        assert verdicts(f"http://127.0.0.1:{port}/", *answers) == [(True, ""), (False, "")]
    finally:
        server.kill()
        server.wait()


def test_a_tracker_follows_a_run_over_a_resume(program, tmp_path):
    program("follow.py")
    follow = importlib.import_module("follow")
    seen, run = {}, tmp_path / "run"
    run.mkdir()
    poll = follow.follow(run, lambda step, values: seen.setdefault(step, {}).update(values))
    next(poll)
    assert not seen
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 0, "policy/loss": 1.0, "policy/entropy": null}\n{"step": 1, "policy/loss": 2.0}\n{"st')
    (run / "timing.jsonl").write_text('{"step": 0, "time/step": 3.0}\n')
    next(poll)
    assert seen == {0: {"policy/loss": 1.0, "time/step": 3.0}, 1: {"policy/loss": 2.0}}
    cut_rows(metrics, 1)  # what a run does that resumes with step 1
    with metrics.open("a") as file:
        file.write('{"step": 1, "policy/loss": 2.5}\n{"step": 2, "policy/loss": 3.0, "policy/entropy": 0.5}\n')
    next(poll)
    assert seen[1] == {"policy/loss": 2.5}
    assert seen[2] == {"policy/loss": 3.0, "policy/entropy": 0.5}
