"""Nodes of a preflight as processes of this host, with the variables that Slurm gives to a task."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}


def write_inputs(directory: Path) -> Path:
    """Writes a model (config.json and a file in place of weights), data and a configuration, and returns the last."""
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(MODEL))
    (directory / "model" / "model.safetensors").write_bytes(b"weights")
    (directory / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (directory / "shared").mkdir()
    config = directory / "config.yaml"
    config.write_text(
        f"model: {{path: {directory}/model}}\n"
        f"data: {{files: [{directory}/data.jsonl]}}\n"
        f"run: {{output: {directory}/shared/run}}\n"
        "rollout: {engine: embedded}\n"
    )
    return config


def free_port() -> int:
    """Returns a port at which nothing listens on any address."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        rank: Its rank.
        before: Program and arguments that start the node's program, which follows.
        environment: Variables of this node alone.
    """

    rank: int
    before: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def run_nodes(
    config: Path, *arguments: str, nodes: Sequence[Node], count: int, master_port: int, address: str = "127.0.0.1"
) -> dict[int, subprocess.CompletedProcess]:
    """Runs a preflight on nodes ``n1``, ``n2`` and so on, of which some may be missing; returns how each ended."""
    command = [sys.executable, "-m", "fipo_megatron.cli", "preflight", str(config), *arguments]
    variables = {
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": f"n[1-{count}]",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(master_port),
    }
    started = {}
    for node in nodes:
        own = {"SLURM_PROCID": str(node.rank), "SLURMD_NODENAME": f"n{node.rank + 1}", **node.environment}
        started[node.rank] = subprocess.Popen(
            [*node.before, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables | own,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    ended = {}
    try:
        for rank, process in started.items():
            output, errors = process.communicate(timeout=240)
            ended[rank] = subprocess.CompletedProcess([], process.returncode, output, errors)
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    return ended
