"""A process that checks one answer after the other.

    python -m fipo_megatron.reward.child VERIFIER SECONDS MEBIBYTES

Reads requests from stdin and writes verdicts to stdout, JSON with its length before it. It ends with its parent, and
with an answer that takes more CPU time than SECONDS; memory above MEBIBYTES it does not get. It can write no files.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from fipo_megatron.reward import answers

Check = Callable[[str, str], tuple[bool, str | None]]
_OPEN_FILES = 64
_LAST_CHARACTERS = 4000
"""Of a response, in which its answer is looked for: bounds the time."""


def main(verifier: str, seconds: str, mebibytes: str) -> None:
    """Answers requests until stdin ends."""
    check = load(verifier)
    if verifier == "math":
        answers.math("Answer: $x+1$", "$1+x$")  # imports what takes a second
    requests, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a verifier prints is no verdict
    _limit(int(mebibytes) << 20)
    verdicts.write(framed({"ready": True}))
    verdicts.flush()
    while header := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(header, "little")))
        _allow_cpu(float(seconds))
        verdicts.write(framed(_verdict(check, request)))
        verdicts.flush()


def load(verifier: str) -> Check:
    """The function behind a verifier's name.

    Raises:
        ImportError, AttributeError, TypeError: ``python:`` names no function.
    """
    if verifier in ("math", "exact"):
        found: Check = getattr(answers, verifier)
        return found
    module, _, name = verifier.removeprefix("python:").rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{verifier}: is no function")
    return lambda response, ground_truth: (float(function(response, ground_truth)) > 0, _last_answer(response))


def _last_answer(response: str) -> str | None:
    """What a response gives as its answer, where the verifier does not say: for the vote of an evaluation."""
    found = answers.extract(response[-_LAST_CHARACTERS:])
    return found and found[: answers.MAX_ANSWER_CHARACTERS]


def framed(message: dict[str, Any]) -> bytes:
    """JSON with its length before it, four bytes, little-endian."""
    content = json.dumps(message).encode()
    return len(content).to_bytes(4, "little") + content


def _verdict(check: Check, request: dict[str, str]) -> dict[str, Any]:
    try:
        correct, extracted = check(request["response"], request["ground_truth"])
    except MemoryError:
        return {"correct": False, "extracted": None, "failure": "memory"}
    except Exception as error:
        return {"correct": False, "extracted": None, "failure": "error", "detail": repr(error)[:300]}
    return {"correct": bool(correct), "extracted": extracted, "failure": ""}


def _limit(memory: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def _allow_cpu(seconds: float) -> None:
    """So much more CPU time from now on; the kernel ends the process after it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(*sys.argv[1:])
