"""Verifiers of users: valid ones, and ones that hang, crash, exhaust memory, print and write files."""

import ctypes
import os
import time


def contains(response, ground_truth):
    print("this is not a verdict")
    return ground_truth in response


def score(response, ground_truth):
    return float(response)


def by_command(response, ground_truth):
    """Executes the command in the response, so one verifier shows every kind of failure."""
    if response == "hang":
        time.sleep(1000)
    if response == "spin":
        while True:
            pass
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
