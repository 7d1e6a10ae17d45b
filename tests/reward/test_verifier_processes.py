"""Children of a verifier that are killed, fill their standard error, fork, or outlive their parent."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.reward import child_process, child_verifier
from fipo_megatron.reward.child_process import ChildProcess
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.reward.verifier_protocol import Answer
from tests.processes import ROOT, children
from tests.reward.test_verifier import config, verify

pytestmark = pytest.mark.timeout(60)
IMPORTS = """
import asyncio
from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.child_process import ChildProcess
from fipo_megatron.reward.verifier_protocol import Answer
from fipo_megatron.reward.verifier import open_verifier
"""
COMMANDS = "python:tests.reward.verifiers.by_command"


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(processes, seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, f"{processes} are still alive"
        time.sleep(0.02)


def test_standard_error_is_drained_and_its_end_is_kept():
    """200 answers write 400 KiB, more than a pipe holds; a crash quotes at most the last 2000 characters."""
    answers = [Answer("noise", "noise")] * 200 + [Answer("noise", "")] * 10 + [Answer("exit", "")]
    verdicts, counts = verify(COMMANDS, answers, verifier_processes=1)
    assert [verdict.correct for verdict in verdicts] == [True] * 200 + [False] * 11
    assert counts == {"verified": 211, "crash": 1}
    assert "xxxxx" in verdicts[-1].detail
    assert len(verdicts[-1].detail) < 2200


def test_signals_that_slurm_sends_to_every_process_of_a_step_change_no_verdict():
    """The trainer finishes its step after them, and a verdict that is missing would change what it learns."""

    async def check():
        async with asyncio.timeout(30):
            child = await ChildProcess.start(COMMANDS, 5.0, 2048)
            await child.receive()
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
                os.kill(child._process.pid, number)
            child.send([{"response": "a", "ground_truth": "a"}])
            verdict = await child.receive()
            await child.end()
            return verdict

    assert asyncio.run(check())["correct"]


@pytest.mark.parametrize(("answer", "kind"), [("fork and kill", "crash"), ("fork and hang", "timeout")])
def test_forked_processes_are_killed_with_their_group(answer, kind, monkeypatch):
    """They hold the child's connection and standard error, so neither is ever closed by itself."""
    output = []
    monkeypatch.setattr(ChildProcess, "end", _record(ChildProcess.end, output))
    start = time.monotonic()
    verdicts, _ = verify(COMMANDS, [Answer(answer, ""), Answer("a", "a")], verifier_processes=1, verifier_seconds=0.5)
    assert time.monotonic() - start < 15
    assert verdicts[0].failure in (kind, "timeout")
    assert verdicts[1].correct
    forked = {int(number) for number in re.findall(r"forked (\d+)", "".join(output))}
    assert len(forked) == 3
    await_end(forked)
    assert not children()


def _record(end, output):
    async def recording(self):
        code = await end(self)
        output.append(self.standard_error)
        return code

    return recording


def test_a_child_that_is_killed_while_it_starts_is_started_again_a_few_times(monkeypatch):
    """A kill that happens once costs nothing; one that happens every time ends with the signal's name."""
    kills = []

    def kill_first(times):
        start = ChildProcess.start

        async def killing(*arguments):
            child = await start(*arguments)
            if len(kills) < times:
                kills.append(child)
                os.kill(child._process.pid, signal.SIGKILL)
            return child

        monkeypatch.setattr(ChildProcess, "start", killing)

    kill_first(2)
    verdicts, _ = verify(COMMANDS, [Answer("a", "a")], verifier_processes=1)
    assert verdicts[0].correct
    assert len(kills) == 2
    kill_first(1000)
    with pytest.raises(VerifierError, match="its process does not start: it was killed by SIGKILL 3 times in a row"):
        verify(COMMANDS, [Answer("a", "a")], verifier_processes=1)
    assert len(kills) == 5
    assert not children()


def test_a_child_that_is_killed_again_and_again_ends_with_a_message(monkeypatch):
    monkeypatch.setattr(child_verifier, "_CRASHES", 3)
    verdicts, _ = verify(COMMANDS, [Answer("kill", ""), Answer("a", "a")] * 3, verifier_processes=1)
    assert [verdict.failure for verdict in verdicts] == ["crash", ""] * 3
    assert "its process was killed by SIGKILL" in verdicts[0].detail
    with pytest.raises(VerifierError, match=r"its process was killed by SIGKILL\n3 answers in a row ended like this"):
        verify(COMMANDS, [Answer("kill", "")] * 3, verifier_processes=1)
    assert not children()


def test_an_idle_child_that_was_killed_is_replaced():
    async def run():
        opened = open_verifier(config(COMMANDS, verifier_processes=1))
        try:
            assert (await opened.verify(Answer("a", "a"))).correct
            os.kill(children()[0], signal.SIGKILL)
            await asyncio.sleep(0.1)
            assert (await opened.verify(Answer("a", "a"))).correct
            return opened.counts
        finally:
            await opened.close()

    assert asyncio.run(run()) == {"verified": 2}


@pytest.mark.parametrize("answer", ["hang", "fork and hang", "ignore"])
@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_closing_waits_neither_for_checks_nor_for_starts(answer, seconds):
    """Children are closed while they start and while they check; the checks that are cut off end at once, too."""

    async def run():
        opened = open_verifier(config(COMMANDS, verifier_seconds=100.0))
        checks = [asyncio.create_task(opened.verify(Answer(answer, ""))) for _ in range(4)]
        await asyncio.sleep(seconds)
        start = time.monotonic()
        await opened.close()
        ended = await asyncio.wait_for(asyncio.gather(*checks, return_exceptions=True), 10)
        assert time.monotonic() - start < 5
        assert all(isinstance(one, VerifierError) or one.failure == "crash" for one in ended)

    asyncio.run(run())
    assert not children()


def test_a_cancelled_check_kills_its_child():
    async def run():
        opened = open_verifier(config(COMMANDS, verifier_processes=1, verifier_seconds=100.0))
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(opened.verify(Answer("hang", "")), 1.0)
            assert not children()
            assert (await opened.verify(Answer("a", "a"))).correct
        finally:
            await opened.close()

    asyncio.run(run())


def test_a_child_has_a_hard_limit_of_cpu_time():

    async def run():
        child = await ChildProcess.start(COMMANDS, 1.0, 2048)
        try:
            await child.receive()
            limits = Path(f"/proc/{child._process.pid}/limits").read_text()
            child.send([{"response": "a", "ground_truth": "a"}])
            assert not (await child.receive())["last"]
            return re.search(r"Max cpu time +(\d+) +(\d+)", limits).groups()
        finally:
            await child.end()

    soft, hard = asyncio.run(run())
    assert 60 <= int(hard) <= 70
    assert int(soft) <= int(hard)


def test_a_child_is_renewed_before_its_hard_limit_of_cpu_time():
    """Each child could be killed during its second answer; the limit of 6 s is inherited."""
    code = (
        f"{IMPORTS}\n"
        f"config = RewardConfig(verifier='{COMMANDS}', verifier_processes=1, verifier_seconds=5.0)\n"
        "start, numbers = ChildProcess.start, set()\n"
        "async def recording(*arguments):\n"
        "    child = await start(*arguments)\n"
        "    numbers.add(child._process.pid)\n"
        "    return child\n"
        "ChildProcess.start = recording\n"
        "async def run():\n"
        "    verifier = open_verifier(config)\n"
        "    verdicts = [await verifier.verify(Answer('a', 'a')) for _ in range(3)]\n"
        "    await verifier.close()\n"
        "    return all(verdict.correct for verdict in verdicts)\n"
        "print(asyncio.run(run()), len(numbers))\n"
    )
    limited = ["bash", "-c", 'ulimit -t 6; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert done.stdout.split() == ["True", "3"], done.stderr


@pytest.mark.parametrize("answer", ["hang", "ignore"])
def test_children_die_with_a_parent_that_is_killed(answer):
    code = (
        f"{IMPORTS}\n"
        f"verifier = open_verifier(RewardConfig(verifier='{COMMANDS}', verifier_seconds=100.0))\n"
        "async def run():\n"
        "    await verifier.verify(Answer('a', 'a'))\n"
        "    print(next(iter(verifier._children))._process.pid, flush=True)\n"
        f"    await verifier.verify(Answer('{answer}', ''))\n"
        "asyncio.run(run())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        assert is_alive(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    await_end([child])


def test_a_reply_that_is_too_long_is_a_crash(monkeypatch):
    monkeypatch.setattr(child_process, "_FRAME_BYTES", 10)

    async def run():
        child = await ChildProcess.start(COMMANDS, 1.0, 2048)
        try:
            with pytest.raises(ValueError, match="its reply has"):
                await child.receive()
        finally:
            await child.end()

    asyncio.run(run())
    assert not children()


def record_messages(monkeypatch):
    """Returns a list to which the number of answers in each message is appended."""
    sizes = []
    send = ChildProcess.send

    def recorded(child, requests):
        requests = list(requests)
        sizes.append(len(requests))
        send(child, requests)

    monkeypatch.setattr(ChildProcess, "send", recorded)
    return sizes


@pytest.mark.parametrize("processes", [1, 3])
def test_answers_that_share_a_message_have_verdicts_of_their_own(processes, monkeypatch):
    """A child that ends takes no verdict with it: what it was not yet asked goes to another one."""
    sizes = record_messages(monkeypatch)
    expected = {"a": (True, ""), "b": (False, ""), "raise": (False, "error"), "leave": (False, "error")}
    expected |= {"kill": (False, "crash"), "exit": (False, "crash"), "memory": (False, "memory")}
    random = Random(processes)
    commands = random.choices(["a", "b"], k=200) + random.sample(sorted(expected), k=len(expected)) * 2
    commands += ["hang", *random.choices(["a", "b"], k=20), "spin", "a"]
    expected |= {"hang": (False, "timeout"), "spin": (False, "")}

    async def run():
        verifier = open_verifier(config(COMMANDS, verifier_processes=processes, verifier_seconds=0.5))
        try:
            await verifier.verify(Answer("a", "a"))
            return await asyncio.gather(*(verifier.verify(Answer(command, "a")) for command in commands))
        finally:
            await verifier.close()

    verdicts = asyncio.run(run())
    assert [(verdict.correct, verdict.failure) for verdict in verdicts] == [expected[command] for command in commands]
    assert max(sizes) > 20
    assert not children()


def test_long_checks_are_sent_one_at_a_time(monkeypatch):
    """Behind one that takes long, an answer would wait although another child is idle."""
    sizes = record_messages(monkeypatch)
    verdicts, _ = verify("python:tests.reward.verifiers.slowly", [Answer("a", "a")] * 8, verifier_processes=2)
    assert all(verdict.correct for verdict in verdicts)
    assert sizes == [1] * 8


def test_a_cancelled_check_leaves_the_others_of_its_message(monkeypatch):
    sizes = record_messages(monkeypatch)

    async def run():
        opened = open_verifier(config(COMMANDS, verifier_processes=1, verifier_seconds=100.0))
        try:
            await opened.verify(Answer("a", "a"))
            answers = ["a", "a", "hang", "a", "b", "a"]
            checks = [asyncio.create_task(opened.verify(Answer(answer, "a"))) for answer in answers]
            await checks[1]
            checks[2].cancel()
            checks[4].cancel()
            found = await asyncio.gather(*checks, return_exceptions=True)
            return found, opened.counts
        finally:
            await opened.close()

    found, counts = asyncio.run(run())
    assert [isinstance(one, asyncio.CancelledError) or one.correct for one in found] == [True] * 6
    assert [number for number, one in enumerate(found) if isinstance(one, asyncio.CancelledError)] == [2, 4]
    assert counts == {"verified": 5}
    assert 6 in sizes
    assert not children()


def test_a_cancellation_after_the_reply_fails_no_other_answer():
    """The reply may have arrived while the loop was busy: the child is killed, and the next answer is not its fault."""

    async def run():
        opened = open_verifier(config(COMMANDS, verifier_processes=1))
        try:
            await opened.verify(Answer("a", "a"))
            verdicts = []
            for turns in range(8):
                answers = [Answer("a", "a"), *[Answer("rest", "rest")] * 3]
                checks = [asyncio.create_task(opened.verify(answer)) for answer in answers]
                for _ in range(turns):
                    await asyncio.sleep(0)
                time.sleep(0.005)  # as a pass of the embedded engine; the first reply arrives
                await asyncio.sleep(0)
                checks[0].cancel()
                verdicts += await asyncio.gather(*checks, return_exceptions=True)
            return verdicts
        finally:
            await opened.close()

    found = [one for one in asyncio.run(run()) if not isinstance(one, asyncio.CancelledError)]
    assert 8 * 3 <= len(found) < 8 * 4
    assert all(one.correct for one in found), Counter(one.failure for one in found)
    assert not children()


def test_answers_behind_a_crash_go_to_idle_children(monkeypatch):
    """The child that is started in place of the crashed one imports the verifier first: here until they are checked."""
    start, starts = ChildProcess.start, []

    async def run():
        checked = asyncio.Event()

        async def slow_start(*arguments):
            starts.append(arguments)
            if len(starts) > 2:
                await checked.wait()
            return await start(*arguments)

        monkeypatch.setattr(ChildProcess, "start", slow_start)
        opened = open_verifier(config(COMMANDS, verifier_processes=2))
        try:
            await asyncio.gather(*(opened.verify(Answer("a", "a")) for _ in range(2)))
            crash, *others = (
                asyncio.create_task(opened.verify(Answer(answer, "a"))) for answer in ["kill", *["a"] * 9]
            )
            verdicts = await asyncio.wait_for(asyncio.gather(*others), 30)
            checked.set()
            return [await crash, *verdicts]
        finally:
            checked.set()
            await opened.close()

    assert [one.failure for one in asyncio.run(run())] == ["crash"] + [""] * 9
    assert len(starts) == 3


def test_time_in_which_the_loop_stood_still_is_not_that_of_an_answer():
    async def run():
        opened = open_verifier(config(COMMANDS, verifier_processes=1, verifier_seconds=0.3))
        try:
            await opened.verify(Answer("a", "a"))
            check = asyncio.create_task(opened.verify(Answer("noise", "noise")))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(2.0)  # longer than the limit of wall time
            return await check
        finally:
            await opened.close()

    assert asyncio.run(run()).correct
