"""An SGLang server as a process on this machine; :mod:`.sglang.server_supervisor` restarts it.

SGLang has its own environment (``make sglang-env``), because it pins its torch and transformers. A server has its own
process group, which ends as a whole, also when this process is killed.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang import shared_memory
from fipo_megatron.rollout.sglang.control import ControlClient
from fipo_megatron.rollout.sglang.server_environment import server_environment

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
"""Arguments that SGLang 0.5.23 needs on a machine without a GPU."""

_RESERVED = ("host", "port", "model_path", "weight_version", "skip_server_warmup", "nccl_port")
"""Arguments that follow from other settings."""
_SECRET = ("api_key", "admin_api_key", "ssl_keyfile_password")
"""Arguments that are passed in the environment, because everybody on the host can read command lines."""
_LOG_LINES = 30
_READY_POLL_SECONDS = 0.3
_READY_TIMEOUT = 5.0


@dataclass(frozen=True)
class ServerSpec:
    """The settings with which a server is started.

    Attributes:
        python: Python interpreter of SGLang's environment.
        model_path: Directory of a Hugging Face model.
        log: File to which the server's output is appended.
        arguments: Arguments of SGLang by the names of its ``ServerArgs``: ``tp_size``, ``mem_fraction_static``,
            ``enable_memory_saver``, ``enable_deterministic_inference`` and so on.
        environment: Variables beside those that :func:`.server_environment.server_environment` keeps of this process.
        host: Address to listen at.
        cpu: Whether the server runs without a GPU.
        weight_version: Version of the weights in ``model_path``.
        ready_seconds: Seconds from its start within which the server must answer requests.
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
    """Checks that the installed SGLang has the given arguments; takes some seconds.

    Raises:
        EngineError: SGLang cannot be imported in its environment.
        ValueError: SGLang has no argument of a name, or the name is reserved; all such names are listed.
    """
    program = (
        "import argparse, json, sglang.srt.server_args as s\n"
        "parser = argparse.ArgumentParser(); s.ServerArgs.add_cli_args(parser)\n"
        "print(json.dumps([action.dest for action in parser._actions]))"
    )
    names = json.loads(run_python(spec, program, "SGLang"))
    problems = []
    for name, value in spec.arguments.items():
        where = f"rollout.sglang.{name} = {'…' if name in _SECRET else repr(value)}"
        if name in _RESERVED:
            problems.append(f"{where}: cannot be set here, it follows from other settings")
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{where}: the installed SGLang has no such argument{hint}")
    if problems:
        raise ValueError("\n".join(problems))


def run_python(spec: ServerSpec, program: str, what: str) -> str:
    """Runs a program in the Python and the environment of a server, and returns the last line that it prints.

    Args:
        spec: Settings of the server.
        program: Text of the program.
        what: Name of what it imports, for the message.

    Raises:
        EngineError: there is no such Python, or the program fails.
    """
    try:
        done = subprocess.run(
            [str(spec.python), "-c", program], env=_environment(spec), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise EngineError(f"{spec.python}: {error.strerror}; `make sglang-env` makes SGLang's environment") from error
    if done.returncode:
        raise EngineError(f"{spec.python}: {what} cannot be imported:\n{done.stderr[-2000:].strip()}")
    return done.stdout.splitlines()[-1]


def free_port(host: str) -> int:
    """Returns a port on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _environment(spec: ServerSpec) -> dict[str, str]:
    environment = server_environment(os.environ, spec.environment)
    if secret := {_option(name): str(spec.arguments[name]) for name in _SECRET if spec.arguments.get(name) is not None}:
        environment["FIPO_SGLANG_SECRET_ARGUMENTS"] = json.dumps(secret)
    if spec.cpu:
        paths = [str(CPU_SUPPORT), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return environment


def _command(spec: ServerSpec, port: int) -> list[str]:
    given = dict(CPU_ARGUMENTS if spec.cpu else {}) | {k: v for k, v in spec.arguments.items() if k not in _SECRET}
    given |= {
        "model_path": str(spec.model_path),
        "host": spec.host,
        "port": port,
        "weight_version": str(spec.weight_version),
        "skip_server_warmup": True,
    }
    options: list[str] = []
    for name, value in given.items():
        option = _option(name)
        if value is True:
            options.append(option)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            options += [option, *map(str, value)]
        elif value is not None and value is not False:
            options += [option, str(value)]
    start = str(CPU_SUPPORT / "start.py")
    return [str(spec.python), start, str(os.getpid()), "sglang.launch_server", *options]


class SglangServer:
    """A server process.

    Args:
        spec: Settings with which it is started.
        port: Port to listen at; None for a free one, which it keeps when it is restarted.

    Attributes:
        starts: Number of times it was started.
    """

    def __init__(self, spec: ServerSpec, port: int | None = None) -> None:
        self.spec = spec
        self.port = port or free_port(spec.host)
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._shared: set[Path] = set()

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://{self.spec.host}:{self.port}"

    @property
    def process_id(self) -> int | None:
        """Process id of its first process; None before it is started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts the server and waits until it answers requests. Stops what is left of an earlier start first.

        Raises:
            EngineError: it ended, or did not answer within ``ready_seconds``; the message has the end of its log.
        """
        await self.stop()
        self.starts += 1
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.spec.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
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
        self._shared = shared_memory.files_of_session(self._process.pid)  # cannot be read any more if it ends by itself

    async def _until_ready(self) -> None:
        end = time.monotonic() + self.spec.ready_seconds
        async with ControlClient(self.spec.arguments.get("api_key"), timeout=_READY_TIMEOUT) as control:
            while time.monotonic() < end:
                if not self.alive:
                    raise EngineError(f"the SGLang server at {self.url} ended while it started:\n{self._log_tail()}")
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    status, _ = await control.exchange(f"{self.url}/health_generate", None)
                    if status == 200:
                        return
                await asyncio.sleep(_READY_POLL_SECONDS)
        raise EngineError(
            f"the SGLang server at {self.url} did not serve within {self.spec.ready_seconds:g} s:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = self.spec.log.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-_LOG_LINES:], f"({self.spec.log})"])

    async def stop(self) -> None:
        """Kills the whole process group; a server holds no state that must be saved."""
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
