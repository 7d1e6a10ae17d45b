"""A bounded process that checks answers, one after the other.

    python -m fipo_megatron.reward.child VERIFIER SECONDS MEBIBYTES PARENT [TAG ...]

TAG is an end tag of thinking, ``reward.thinking_end``. The process reads requests from file descriptor 0 and writes
verdicts to file descriptor 1, as length-prefixed JSON. It exits at the end of the requests, and the kernel kills it if
an answer takes more CPU time than SECONDS, or if the process PARENT has ended. Its address space is limited to
MEBIBYTES, and it cannot write files.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fipo_megatron.reward import answers

Check = Callable[[str, str], tuple[bool, str | None]]
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that Slurm sends to every process of a step: the trainer finishes its step, and needs its verdicts."""
_OPEN_FILES = 64
_PR_SET_PDEATHSIG = 1
_LIFE_SECONDS = 60.0
"""CPU seconds of a child's life, at least; the hard limit, which ends a child that ignores the soft one."""
_DETAIL_CHARACTERS = 300


def main(verifier: str, seconds: str, mebibytes: str, parent: str, *thinking_end: str) -> None:
    """Checks requests until they end."""
    _die_with(int(parent))
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    check = load(verifier, thinking_end)
    if verifier == "math":
        answers.math("Answer: $x+1$", "$1+x$")  # imports SymPy, which takes half a second
    requests, verdicts = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for descriptor in (0, 1):  # what the verifier reads and prints must not mix with requests and verdicts
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    hard = _limit(int(mebibytes) << 20, float(seconds))
    verdicts.write(encode_frame({"cpu_seconds": _cpu_seconds()}))
    verdicts.flush()
    while header := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(header, "little")))
        _allow_cpu(float(seconds), hard)
        verdict = _verdict(check, request)
        used = _cpu_seconds()
        verdict |= {"cpu_seconds": used, "last": used + float(seconds) + 2 > hard}
        verdicts.write(encode_frame(verdict))
        verdicts.flush()


def load(verifier: str, thinking_end: Sequence[str] = answers.THINKING_END) -> Check:
    """Returns the function behind a verifier's name.

    Args:
        verifier: Name of the verifier.
        thinking_end: End tags of thinking; see :mod:`.extraction`.

    Raises:
        ImportError: The module of a ``python:`` verifier cannot be imported.
        AttributeError: The module has no such function.
        TypeError: The name is not a function.
    """
    if verifier in ("math", "exact"):
        builtin = answers.math if verifier == "math" else answers.exact
        return lambda response, ground_truth: builtin(response, ground_truth, thinking_end)
    module, _, name = verifier.removeprefix("python:").rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{verifier}: is not a function")
    return lambda response, ground_truth: (
        _is_right(function(response, ground_truth)),
        _last_answer(response, thinking_end),
    )


def _is_right(value: Any) -> bool:
    """Returns whether the result of a user's function means that an answer is right.

    Raises:
        TypeError: The result is neither a bool nor a number.
        ValueError: The result is not finite.
    """
    if isinstance(value, str | bytes | bytearray) or not hasattr(value, "__float__"):
        raise TypeError(f"the function must return a bool or a number, got {value!r:.100}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the function must return a finite number, got {number}")
    return number > 0


def _last_answer(response: str, thinking_end: Sequence[str]) -> str | None:
    """Returns the answer of a response for the vote of an evaluation, for verifiers that return none."""
    answer = answers.extract(response, thinking_end)
    return answer and answer[: answers.MAX_ANSWER_CHARACTERS]


def encode_frame(message: dict[str, Any]) -> bytes:
    """Encodes JSON with its length in front: four bytes, little-endian."""
    content = json.dumps(message).encode()
    return len(content).to_bytes(4, "little") + content


def _verdict(check: Check, request: dict[str, str]) -> dict[str, Any]:
    try:
        correct, extracted = check(request["response"], request["ground_truth"])
    except MemoryError:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0] >> 20
        return _failure("memory", f"more than reward.verifier_memory_mib = {limit}")
    except BaseException as error:  # a user's function may raise SystemExit
        return _failure("error", f"{type(error).__name__}: {error}")
    return {"correct": bool(correct), "extracted": extracted, "failure": "", "detail": ""}


def _failure(kind: str, detail: str) -> dict[str, Any]:
    return {"correct": False, "extracted": None, "failure": kind, "detail": detail[:_DETAIL_CHARACTERS]}


def _die_with(parent: int) -> None:
    """Lets the kernel kill this process, and those that it forks, when the process that started it has ended."""

    def ask() -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    ask()
    os.register_at_fork(after_in_child=ask)
    if os.getppid() != parent:
        sys.exit("the process that started this verifier has ended")


def _limit(memory: int, seconds: float) -> int:
    """Sets the limits that hold for the whole life of the process; returns its hard limit of CPU seconds."""
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    hard = int(_cpu_seconds() + max(_LIFE_SECONDS, 10 * seconds)) + 1
    inherited = resource.getrlimit(resource.RLIMIT_CPU)[1]
    hard = hard if inherited == resource.RLIM_INFINITY else min(hard, inherited)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    return hard


def _allow_cpu(seconds: float, hard: int) -> None:
    """Limits the CPU time from now on; the kernel kills the process after it."""
    resource.setrlimit(resource.RLIMIT_CPU, (min(int(_cpu_seconds() + seconds) + 1, hard), hard))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(*sys.argv[1:])
