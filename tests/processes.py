"""Processes of a test: ranks that are forked from a server, and the children of this process.

Importing torch, transformers and Megatron takes about 10 s per process. The server imports them once; each rank is a
fork of it, with its own memory, signals and exit code.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PRELOADED = (
    *("tests.processes", "fipo_megatron.train", "fipo_megatron.trainer.trainer"),
    "transformers.models.qwen2.modeling_qwen2",
)
GRACE_SECONDS = 5.0

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(PRELOADED))


@dataclass(frozen=True)
class Finished:
    """The end of a job.

    Attributes:
        code: Exit code of the first rank that failed, negative for a signal; 0 if none failed.
        output: Standard output and standard error of all ranks.
    """

    code: int
    output: str


def run_ranks(
    module: str,
    *arguments: object,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> Finished:
    """Calls ``module.main(*arguments)`` on every rank; an integer that it returns is the exit code.

    The environment is that of this process, torchrun's variables unless ``ranks`` is None, which is one process alone,
    and ``environment``. The ranks use a store that this process serves, as torchrun's agent does: no port is guessed.

    Raises:
        TimeoutError: a rank has not ended in time; all are killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        log.touch()
        processes = []
        for rank in range(ranks or 1):
            variables = os.environ | {"OMP_NUM_THREADS": "1"} | (_launch(rank, ranks, store.port) if store else {})
            start = (module, arguments, variables | (environment or {}), str(log))
            processes.append(_CONTEXT.Process(target=_rank, args=start))
        code = _run(processes, time.monotonic() + timeout)
        output = log.read_text(errors="replace")
    if code is None:
        raise TimeoutError(f"{module} on {ranks or 1} ranks: not done after {timeout} s\n{output[-6000:]}")
    return Finished(code, output)


def _launch(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _rank(module: str, arguments: tuple[object, ...], environment: dict[str, str], log: str) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.argv = [module, *map(str, arguments)]
    code = importlib.import_module(module).main(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _run(processes: list[multiprocessing.Process], deadline: float) -> int | None:
    """Starts the processes and waits for them; after a failure the others have a few seconds left.

    Returns:
        The exit code of the first that failed, 0 if none did, None if the deadline has passed.
    """
    code, running = 0, []
    try:
        for process in processes:
            process.start()
            running.append(process)
        while running:
            ready = connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            if not ready:
                return code or None
            for process in [process for process in running if process.sentinel in ready]:
                process.join()
                running.remove(process)
                if process.exitcode and not code:
                    code, deadline = process.exitcode, min(deadline, time.monotonic() + GRACE_SECONDS)
        return code
    finally:
        for process in running:
            process.kill()
            process.join()


def children() -> list[int]:
    """Returns the processes that this one has started and that are still there, without the server of ranks."""
    server = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended; its children are another's now
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if child not in server]
