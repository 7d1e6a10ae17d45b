"""The versions of the packages of this node, in the trainer's environment and in SGLang's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

import fipo_megatron
from fipo_megatron.config import Config
from fipo_megatron.rollout.engine import EngineError
from fipo_megatron.rollout.sglang.nccl_version import nccl_problem, trainer_version
from fipo_megatron.rollout.sglang.server import ServerSpec, run_python

TRAINER = (
    *("torch", "megatron-core", "transformers", "transformer-engine", "flash-attn", "apex", "numpy", "triton"),
    *("safetensors", "tokenizers", "fipo-megatron"),
)
SERVERS = ("sglang", "torch", "transformers")
_PROGRAM = """
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
for name in NAMES:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def trainer_versions() -> dict[str, str]:
    """Returns the versions of Python, of :data:`TRAINER` as far as installed, of NCCL, and of this package's sources.

    Sources have a checksum, because two checkouts of one version may differ.
    """
    found = {"python": platform.python_version()}
    for name in TRAINER:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["NCCL"] = trainer_version()
    return found | {"sources of fipo_megatron": _sources()}


def server_versions(config: Config) -> tuple[dict[str, str], str]:
    """Returns the versions in SGLang's environment, and why it cannot be used.

    With ``rollout.servers.urls`` the servers may run on other nodes and from another environment, so that
    ``rollout.servers.python`` is asked only if it exists.
    """
    if config.algorithm.kind == "sft" or config.rollout.engine != "sglang":
        return {}, ""
    problem = nccl_problem(config) or ""
    python = Path(config.rollout.servers.python)
    if config.rollout.servers.urls and not python.exists():
        return {}, problem
    spec = ServerSpec(python, Path(config.model.path), Path("/dev/null"))
    try:
        answer = run_python(spec, _PROGRAM.replace("NAMES", repr(SERVERS)), "the list of packages")
        versions: dict[str, str] = json.loads(answer)
    except EngineError as error:
        return {}, f"rollout.servers.python = {config.rollout.servers.python}: {error}"
    if "sglang" not in versions:
        problem = f"rollout.servers.python = {config.rollout.servers.python}: sglang is not installed there"
    return versions, problem


def _sources() -> str:
    digest = hashlib.sha256()
    root = Path(fipo_megatron.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
