"""Verifiers of users: valid ones, and ones that hang, crash, exhaust memory, print and write files."""

import ctypes
import os
import signal
import sys
import time


def contains(response, ground_truth):
    print("this is not a verdict")
    return ground_truth in response


def score(response, ground_truth):
    return float(response)


RESULTS = {"nonsense": {"score": 1.0}, "text": "1", "nan": float("nan")}


def fork_sleepers():
    """Forks processes that sleep and hold all descriptors; writes their numbers to the standard error."""
    for _ in range(3):
        if (child := os.fork()) == 0:
            time.sleep(1000)
            os._exit(0)
        os.write(2, f"forked {child}\n".encode())


def by_command(response, ground_truth):
    """Executes the command in the response, so one verifier shows every kind of failure."""
    if response == "hang":
        time.sleep(1000)
    if response == "rest":
        time.sleep(0.02)
    if response == "spin":
        while True:
            pass
    if response == "ignore":
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        while True:
            pass
    if response == "leave":
        sys.exit(5)
    if response in RESULTS:
        return RESULTS[response]
    if response.startswith("noise"):
        sys.stderr.write("x" * 2048 + "\n")
        sys.stderr.flush()
    if response.startswith("fork"):
        fork_sleepers()
    if response == "fork and kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "fork and hang":
        time.sleep(1000)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "exit":
        os._exit(3)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "memory":
        return bytearray(8 << 30)
    if response == "raise":
        raise RuntimeError("no")
    if response.startswith("write "):
        with open(response.removeprefix("write "), "w") as file:
            file.write("here")
    return response == ground_truth


def slowly(response, ground_truth):
    """Needs 30 ms of CPU time."""
    start = time.process_time()
    while time.process_time() < start + 0.03:
        pass
    return response == ground_truth
