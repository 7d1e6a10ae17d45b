"""The actor at long sequences under context parallelism, with ``fipo stress``: peak memory beside the plan; seconds.

A random Qwen3 of two layers on this machine's CPU: float32, hidden 64, one thread per rank. Bytes are those of live
tensors at the peak, weights, gradients and optimizer state included, the largest of all ranks. The resident growth is
the kernel's peak during the passes; glibc returns freed memory at once.

    python -m benchmarks.stress [LENGTH …]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.actor import RETURN_FREED, TORCHRUN
from benchmarks.result_table import print_table, write_result

LENGTHS = (16_384, 65_536)
CONTEXT_SIZES = (1, 2, 4)
BUDGET = "actor.plan_error: 0.2\nactor.future_kl_fraction: 0.01\n"
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 384,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
CONFIG = """\
model: {path: model}
data: {max_prompt_tokens: 64}
rollout: {engine: embedded, prompts_per_step: 16, samples_per_prompt: 8, max_response_tokens: 64}
reward: {overlong_buffer_tokens: 0}
actor: {prompts_per_mini_batch: 4, token_budget: 4096, dtype: float32, distributed_optimizer: false}
"""


def measure(directory: Path, lengths: tuple[int, ...], size: int) -> dict[str, Any]:
    """Runs the actor's part on ``size`` context-parallel ranks in the directory; returns its results."""
    arguments = ["-m", "fipo_megatron.cli", "stress", "config.yaml", f"actor.parallel.context_parallel={size}"]
    options = ["--parts", "actor", "--lengths", ",".join(map(str, lengths)), "--budget", "budget.yaml"]
    launcher = [*TORCHRUN, f"--nproc-per-node={size}"] if size > 1 else []
    root = Path(__file__).parents[1]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    out = f"cp{size}"
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, *options, "--output", out],
        cwd=directory,
        env=os.environ | settings | RETURN_FREED,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    found: dict[str, Any] = json.loads((directory / out / "stress.json").read_text())
    return {"context_parallel": size, "actor": found["actor"], "violations": found["violations"]}


def row(size: int, case: dict[str, Any]) -> dict[str, str]:
    ranks, seconds, metrics = case["ranks"], case["seconds"], case["metrics"]

    def largest(kind: str, name: str) -> float:
        return max(float(rank[kind][name]) for rank in ranks) / 2**20

    growth = max(rank["resident_growth"] for rank in ranks) / 2**20
    return {
        "tokens": f"{case['length']:,}",
        "CP": str(size),
        "log-probs: MiB": f"{largest('measured', 'log_probs'):,.1f}",
        "planned": f"{largest('planned', 'log_probs'):,.1f}",
        "update: MiB": f"{largest('measured', 'update'):,.1f}",
        "planned ": f"{largest('planned', 'update'):,.1f}",
        "largest difference": f"{metrics['plan_error']:.1%}",
        "resident growth": f"{growth:,.1f}",
        "log-probs: s": f"{seconds['log_probs']:.1f}",
        "update: s": f"{seconds['update']:.1f}",
        "Future-KL: ms": f"{1000 * seconds['future_kl']:.1f}",
        "of a step": f"{metrics['future_kl_fraction']:.3%}",
        "whole loss of a step": f"{metrics['loss_fraction']:.3%}",
    }


def main(lengths: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model").mkdir()
        (directory / "model" / "config.json").write_text(json.dumps(MODEL))
        (directory / "config.yaml").write_text(CONFIG)
        (directory / "budget.yaml").write_text(BUDGET)
        cases = [measure(directory, lengths, size) for size in CONTEXT_SIZES]
    rows = [(case["length"], found["context_parallel"], case) for found in cases for case in found["actor"]]
    rows.sort(key=lambda one: one[:2])
    print_table("Actor by length and context-parallel size", [row(size, case) for _, size, case in rows])
    write_result("stress", {"model": MODEL, "budget": BUDGET, "cases": cases})


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or LENGTHS)
