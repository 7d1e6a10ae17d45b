"""A bounded process that checks one answer at a time.

    python -m fipo_megatron.reward.child VERIFIER SECONDS MEBIBYTES [TAG ...]

TAG is an end tag of thinking, ``reward.thinking_end``. The process reads requests from stdin and writes verdicts to
stdout, as length-prefixed JSON. It exits at the end of stdin, and the kernel kills it if an answer takes more CPU time
than SECONDS. Its address space is limited to MEBIBYTES, and it cannot write files.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fipo_megatron.reward import answers

Check = Callable[[str, str], tuple[bool, str | None]]
_OPEN_FILES = 64


def main(verifier: str, seconds: str, mebibytes: str, *thinking_end: str) -> None:
    """Checks requests until stdin ends."""
    check = load(verifier, thinking_end)
    if verifier == "math":
        answers.math("Answer: $x+1$", "$1+x$")  # imports SymPy, which takes half a second
    requests, verdicts = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output of the verifier must not mix with verdicts
    _limit(int(mebibytes) << 20)
    verdicts.write(encode_frame({"ready": True}))
    verdicts.flush()
    while header := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(header, "little")))
        _allow_cpu(float(seconds))
        verdicts.write(encode_frame(_verdict(check, request)))
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
        float(function(response, ground_truth)) > 0,
        _last_answer(response, thinking_end),
    )


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
        return {"correct": False, "extracted": None, "failure": "memory"}
    except Exception as error:
        return {"correct": False, "extracted": None, "failure": "error", "detail": repr(error)[:300]}
    return {"correct": bool(correct), "extracted": extracted, "failure": ""}


def _limit(memory: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _allow_cpu(seconds: float) -> None:
    """Limits the CPU time from now on; the kernel kills the process after it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(*sys.argv[1:])
