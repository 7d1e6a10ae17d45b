"""Verifiers in real child processes and over real HTTP. No content of an answer may stop the step."""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.verifier import check_verifier, open_verifier
from fipo_megatron.reward.verifier_protocol import Answer
from tests.processes import children
from tests.reward import hostile

HOSTILE = int(os.environ.get("FIPO_HOSTILE_ANSWERS", "250"))


def config(name, **changes):
    return RewardConfig(verifier=name, **({"verifier_processes": 2, "verifier_seconds": 2.0} | changes))


def verify(name, answers, **changes):
    """Returns the verdicts in the order of the answers, and the counts."""

    async def run():
        verifier = open_verifier(config(name, **changes))
        try:
            verdicts = await asyncio.gather(*(verifier.verify(answer) for answer in answers))
            return verdicts, verifier.counts
        finally:
            await verifier.close()

    return asyncio.run(run())


def test_right_and_wrong():
    answers = [Answer("Answer: 34", "34"), Answer("Answer: 35", "34"), Answer("\\boxed{\\frac{1}{2}}", "0.5")]
    verdicts, counts = verify("math", answers)
    assert [verdict.correct for verdict in verdicts] == [True, False, True]
    assert [verdict.extracted for verdict in verdicts] == ["34", "35", "\\frac{1}{2}"]
    assert counts == {"verified": 3}
    assert [verdict.correct for verdict in verify("exact", answers)[0]] == [True, False, False]
    assert not children()


def test_verifiers_of_users():
    verdicts, _ = verify("python:tests.reward.verifiers.contains", [Answer("it is 34", "34"), Answer("no", "34")])
    assert [verdict.correct for verdict in verdicts] == [True, False]
    answers = [
        Answer("Answer: 34", "34"),
        Answer("34" + r"\boxed{" * 20_000, "34"),
        Answer("Answer: " + "9" * 999, "34"),
    ]
    verdicts, _ = verify("python:tests.reward.verifiers.contains", answers)
    assert [verdict.extracted for verdict in verdicts] == ["34", None, "9" * 300], "for votes, in bounded time"
    assert [verdict.correct for verdict in verdicts] == [True, True, False]
    verdicts, _ = verify("python:tests.reward.verifiers.score", [Answer("0.5", ""), Answer("0", ""), Answer("a", "")])
    assert [(verdict.correct, verdict.failure) for verdict in verdicts] == [(True, ""), (False, ""), (False, "error")]


def test_a_failing_verifier_costs_one_answer(tmp_path):
    """Each failure is that of one answer; the answers before and after it, in the same processes, are right."""
    kinds = {
        "hang": "timeout",
        "exit": "crash",
        "segfault": "crash",
        "memory": "memory",
        "raise": "error",
        "leave": "error",
        "nonsense": "error",
        "text": "error",
        "nan": "error",
        f"write {tmp_path / 'file'}": "error",
    }
    answers = [Answer("yes", "yes"), *(Answer(kind, "yes") for kind in kinds)] + [Answer("yes", "yes")] * 6
    start = time.monotonic()
    verdicts, counts = verify("python:tests.reward.verifiers.by_command", answers, verifier_seconds=1.0)
    assert time.monotonic() - start < 60
    assert [verdict.correct for verdict in verdicts] == [True] + [False] * 10 + [True] * 6
    assert [verdict.failure for verdict in verdicts[1:11]] == list(kinds.values())
    assert counts == {"verified": 17, "timeout": 1, "crash": 2, "memory": 1, "error": 6}
    details = dict(zip(kinds, [verdict.detail for verdict in verdicts[1:11]], strict=True))
    for kind, text in {
        "hang": "no verdict within 3 s",
        "exit": "its process exited with code 3",
        "segfault": "its process was killed by SIGSEGV",
        "memory": "more than reward.verifier_memory_mib = 2048",
        "raise": "RuntimeError: no",
        "leave": "SystemExit: 5",
        "nonsense": "must return a bool or a number, got {'score': 1.0}",
        "nan": "must return a finite number, got nan",
    }.items():
        assert details[kind].startswith("python:tests.reward.verifiers.by_command: ")
        assert text in details[kind]
    assert all(not verdict.detail for verdict in verdicts if not verdict.failure)
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").read_text()
    assert not children()


def test_an_answer_that_takes_too_much_cpu_time_is_wrong():
    """CPU time is the answer's own, wall time is not. The second answer ignores the kernel's signal."""

    async def run():
        verifier = open_verifier(config("python:tests.reward.verifiers.by_command", verifier_seconds=0.3))
        verifier._wall_seconds = 6.0  # on a busy machine, too
        try:
            commands = ("spin", "ignore", "hang")
            return [await verifier.verify(Answer(command, "")) for command in commands], verifier.counts
        finally:
            await verifier.close()

    verdicts, counts = asyncio.run(run())
    assert [(verdict.correct, verdict.failure) for verdict in verdicts] == [
        (False, ""),
        (False, ""),
        (False, "timeout"),
    ]
    assert counts == {"verified": 3, "cpu_limit": 2, "timeout": 1}


@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_hostile_answers():
    """Hostile answers neither hang nor execute anything, memory stays bounded, and right answers stay right."""
    Path(hostile.MARK).unlink(missing_ok=True)
    peak = 0

    async def run():
        nonlocal peak
        verifier = open_verifier(config("math", verifier_seconds=1.0, verifier_memory_mib=1024))
        done = asyncio.Event()

        async def watch():
            nonlocal peak
            while not done.is_set():
                for child in children():
                    try:
                        lines = Path(f"/proc/{child}/status").read_text().splitlines()
                    except OSError:
                        continue
                    peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
                await asyncio.sleep(0.05)

        watcher = asyncio.create_task(watch())
        answers = [Answer(text, "34") for text in hostile.answers(HOSTILE)]
        right = [Answer("Answer: 34", "34")] * (HOSTILE // 20)
        start = time.monotonic()
        verdicts = await asyncio.gather(*(verifier.verify(answer) for answer in [*answers, *right]))
        seconds = time.monotonic() - start
        done.set()
        await watcher
        await verifier.close()
        return verdicts[:HOSTILE], verdicts[HOSTILE:], seconds

    verdicts, right, seconds = asyncio.run(run())
    failures = Counter(verdict.failure for verdict in verdicts)
    print(f"{HOSTILE} hostile answers in {seconds:.0f} s, {dict(failures)}, peak {peak // 1024} MiB in one child")
    assert all(verdict.correct for verdict in right)
    assert sum(verdict.correct for verdict in verdicts) == 0
    assert peak < 1024 * 1024
    assert not Path(hostile.MARK).exists()
    assert seconds < 3.0 * HOSTILE  # each takes at most 2 × 1 s + 1 s of wall time, two at a time


def test_a_service():
    """Asks a real server on this machine that is right, wrong, slow, returns a score, fails at first or sends HTML."""
    asked = Counter()

    async def handle(request):
        content = await request.json()
        response = content["response"]
        asked[response] += 1
        assert content["data_source"] == "source"
        if response == "flaky" and asked[response] < 3:
            return web.Response(status=500)
        if response == "nonsense":
            return web.Response(text="<html>")
        if response == "slow":
            await asyncio.sleep(60)
        if response == "right":
            return web.json_response({"correct": True, "extracted": "34"})
        return web.json_response({"score": -0.5} if response == "score" else {"correct": response != "wrong"})

    async def run():
        app = web.Application()
        app.router.add_post("/check", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        verifier = open_verifier(config(f"http://127.0.0.1:{port}/check", verifier_seconds=0.5))
        try:
            names = ["right", "wrong", "score", "flaky", "nonsense", "slow"]
            found = [await verifier.verify(Answer(name, "", "prompt", "source")) for name in names]
            return dict(zip(names, found, strict=True)), verifier.counts
        finally:
            await verifier.close()
            await runner.cleanup()

    found, counts = asyncio.run(run())
    assert {name: verdict.correct for name, verdict in found.items() if verdict.correct} == {
        "right": True,
        "flaky": True,
    }
    assert {name: verdict.failure for name, verdict in found.items() if verdict.failure} == {
        "nonsense": "error",
        "slow": "timeout",
    }
    assert counts == {"verified": 6, "error": 1, "timeout": 1}
    assert (found["right"].extracted, found["flaky"].extracted) == ("34", None)
    assert (asked["flaky"], asked["wrong"]) == (3, 1)
    [unreachable], _ = verify("http://127.0.0.1:9/", [Answer("a", "b")])
    assert unreachable.failure == "unreachable"


def test_wrong_names_are_refused_at_once():
    for name in ("maths", "python:", "python:no.such.module", "python:tests.nowhere.function", "http:", "https:///x"):
        with pytest.raises(ValueError, match=r"reward\.verifier = .*(valid:|must be) math, exact"):
            check_verifier(name)
    for name in ("http://host:notaport/", "http://host:70000/check", "http://[::1/", "https://host:0/"):
        with pytest.raises(ValueError, match=r"reward\.verifier = .*: must have a port from 1 to 65535.*; valid: math"):
            check_verifier(name)
    with pytest.raises(ValueError, match=r"must name a host, without spaces"):
        check_verifier("http://a host/")
    for name in ("tests.reward.verifiers.contains", "json.dumps", "math.sqrt", "os.path.basename", "orjson.loads"):
        check_verifier(f"python:{name}")


def test_a_function_that_its_module_does_not_define_is_refused_at_once(tmp_path, monkeypatch):
    """The module is not run; one that defines names as it runs is believed."""
    with pytest.raises(ValueError, match=r"python:json\.nosuch: \S*json/__init__\.py defines no 'nosuch'"):
        check_verifier("python:json.nosuch")
    with pytest.raises(ValueError, match=r"defines no 'contain'; did you mean contains\?"):
        open_verifier(config("python:tests.reward.verifiers.contain"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ending.py").write_text("raise SystemExit(3)\ndef check(**_): return 1\n")
    check_verifier("python:ending.check")
    (tmp_path / "dynamic.py").write_text("globals()['check'] = print\n")
    check_verifier("python:dynamic.check")
    (tmp_path / "broken.py").write_text("def check(:\n")
    with pytest.raises(ValueError, match=r"broken\.py cannot be read: "):
        check_verifier("python:broken.check")
