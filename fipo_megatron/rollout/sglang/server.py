"""Starts SGLang servers on this machine, watches them, starts them again.

SGLang has an environment of its own (``make sglang-env``), because it pins its torch and transformers. A server is a
process group of its own: it ends as a whole, also when this process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang import shared_memory

logger = logging.getLogger(__name__)

CPU_SUPPORT = Path(__file__).with_name("cpu_start")
CPU_ARGUMENTS: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "disable_overlap_schedule": True,
    "grammar_backend": "none",
    "mem_fraction_static": 0.1,
}
"""What SGLang 0.5.23 needs on a machine without a GPU."""

_OURS = ("host", "port", "model_path", "weight_version", "skip_server_warmup", "nccl_port")
_LOG_TAIL = 30


@dataclass(frozen=True)
class ServerSpec:
    """How to start a server.

    Attributes:
        python: Of SGLang's environment.
        model_path: Directory of a Hugging Face model.
        log: Where its output goes; appended.
        arguments: SGLang's own, by the names of its ``ServerArgs``: ``tp_size``, ``mem_fraction_static``,
            ``enable_memory_saver``, ``enable_deterministic_inference`` and so on.
        environment: Added to this process's.
        host: To listen at.
        cpu: Without a GPU.
        weight_version: Of the weights in ``model_path``.
        ready_seconds: It must serve within.
    """

    python: Path
    model_path: Path
    log: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    cpu: bool = False
    weight_version: int = 0
    ready_seconds: float = 600.0


def check_arguments(spec: ServerSpec) -> None:
    """Compares the names of arguments with the installed SGLang's; takes some seconds.

    Raises:
        EngineError: SGLang cannot be imported there.
        ValueError: names that it does not have, or that we set; all are listed.
    """
    program = (
        "import argparse, json, sglang.srt.server_args as s\n"
        "parser = argparse.ArgumentParser(); s.ServerArgs.add_cli_args(parser)\n"
        "print(json.dumps([action.dest for action in parser._actions]))"
    )
    try:
        done = subprocess.run(
            [str(spec.python), "-c", program], env=_environment(spec), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise EngineError(f"{spec.python}: {error.strerror}; `make sglang-env` makes SGLang's environment") from error
    if done.returncode:
        raise EngineError(f"{spec.python}: SGLang cannot be imported:\n{done.stderr[-2000:]}")
    names = json.loads(done.stdout.splitlines()[-1])
    problems = []
    for name, value in spec.arguments.items():
        where = f"rollout.sglang.{name} = {value!r}"
        if name in _OURS:
            problems.append(f"{where}: cannot be set here, it follows from other settings")
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{where}: the installed SGLang has no such argument{hint}")
    if problems:
        raise ValueError("\n".join(problems))


def free_port(host: str) -> int:
    """A port that nobody listens at right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _environment(spec: ServerSpec) -> dict[str, str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(spec.environment)
    if spec.cpu:
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(CPU_SUPPORT)}
    return environment


def _command(spec: ServerSpec, port: int) -> list[str]:
    given = dict(CPU_ARGUMENTS if spec.cpu else {}) | dict(spec.arguments)
    given |= {
        "model_path": str(spec.model_path),
        "host": spec.host,
        "port": port,
        "weight_version": str(spec.weight_version),
        "skip_server_warmup": True,
    }
    options: list[str] = []
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            options.append(option)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            options += [option, *map(str, value)]
        elif value is not None and value is not False:
            options += [option, str(value)]
    start = str(CPU_SUPPORT / "start.py")
    return [str(spec.python), start, str(os.getpid()), "sglang.launch_server", *options]


class SglangServer:
    """One server.

    Args:
        spec: How to start it.
        port: To listen at; None: a free one, which it keeps when it is started again.
    """

    def __init__(self, spec: ServerSpec, port: int | None = None) -> None:
        self.spec = spec
        self.port = port or free_port(spec.host)
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._shared: set[Path] = set()

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://{self.spec.host}:{self.port}"

    @property
    def process_id(self) -> int | None:
        """Of its first process; None before it is started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts it and waits until it serves; stops what is left of an earlier one first.

        Raises:
            EngineError: it ended, or did not serve in time; with the end of its log.
        """
        await self.stop()
        self.starts += 1
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(self.spec, self.port),
                env=_environment(self.spec),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            await self._until_ready()
        except BaseException:
            await self.stop()
            raise
        self._shared = shared_memory.files_of_session(self._process.pid)  # known, if it ends by itself

    async def _until_ready(self) -> None:
        headers = _headers(self.spec.arguments.get("api_key"))
        end = time.monotonic() + self.spec.ready_seconds
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=5)) as session:
            while time.monotonic() < end:
                if not self.alive:
                    raise EngineError(f"the SGLang server at {self.url} ended while it started:\n{self._log_tail()}")
                try:
                    async with session.get(f"{self.url}/health_generate") as answer:
                        if answer.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(0.3)
        raise EngineError(
            f"the SGLang server at {self.url} did not serve within {self.spec.ready_seconds:g} s:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = self.spec.log.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-_LOG_TAIL:], f"({self.spec.log})"])

    async def stop(self) -> None:
        """Ends its whole process group at once; it keeps nothing that could be lost."""
        if self._process is None:
            return
        left = self._shared | shared_memory.files_of_session(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        for path in left:
            with contextlib.suppress(OSError):
                path.unlink()
        self._process, self._shared = None, set()


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class ServerPool:
    """Servers that are started again when they end.

    Args:
        servers: Not started yet.
        restarts: How often each may be started again.
        on_lost: Called with the URL as soon as a server has ended.
        on_restarted: Called with the URL when it serves again, before anybody else uses it: sends the current weights.
        interval: Seconds between two looks.
    """

    def __init__(
        self,
        servers: Sequence[SglangServer],
        *,
        restarts: int = 3,
        on_lost: Callable[[str], None] = lambda url: None,
        on_restarted: Callable[[str], Awaitable[None]] | None = None,
        interval: float = 1.0,
    ) -> None:
        self.servers = tuple(servers)
        self.on_lost, self.on_restarted = on_lost, on_restarted
        self._restarts, self._interval = restarts, interval
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all servers."""
        return tuple(server.url for server in self.servers)

    async def start(self) -> None:
        """Starts all servers at a time, and watches them.

        Raises:
            EngineError: one did not start; all are stopped then.
        """
        check_arguments(self.servers[0].spec)
        results = await asyncio.gather(*(server.start() for server in self.servers), return_exceptions=True)
        if errors := [result for result in results if isinstance(result, BaseException)]:
            await self.close()
            raise errors[0]
        self._watchers = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def _watch(self, server: SglangServer) -> None:
        while True:
            await asyncio.sleep(self._interval)
            if server.alive:
                continue
            self.on_lost(server.url)
            if server.starts > self._restarts:
                logger.error("the SGLang server at %s ended, and was restarted %d times", server.url, self._restarts)
                return
            logger.warning("the SGLang server at %s ended; starting it again", server.url)
            try:
                await server.start()
                if self.on_restarted is not None:
                    await self.on_restarted(server.url)
            except Exception as error:
                logger.error("%s", error)
                await server.stop()

    async def close(self) -> None:
        """Stops watching, then all servers."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in self.servers))
