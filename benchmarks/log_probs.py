"""Log-probs of the labels: in chunks with recomputed logits, against all logits at once.

Forward and backward of the output layer and the softmax, float32, one tensor-parallel rank. Every measurement runs in
its own process and records seconds and peak resident memory above that of the inputs (gradients are included).

    python -m benchmarks.log_probs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_table import print_table, write_result
from fipo_megatron.actor.log_probs import token_log_probs

WIDTH = 128
SHAPES = [(2048, 32_768), (8192, 32_768), (32_768, 32_768), (8192, 152_064)]
CHUNK_TOKENS = 256
PLAIN_LIMIT = 6e9


def plain_bytes(tokens: int, columns: int) -> int:
    """Returns the bytes of log-probs, their gradient and that of the logits: 3 · tokens · columns in float32."""
    return 3 * 4 * tokens * columns


def chunk_bytes(columns: int, with_entropy: bool) -> int:
    """Returns the bytes of a chunk's logits, once or twice, and of the gradient of the weight."""
    return 4 * CHUNK_TOKENS * columns * (1 + with_entropy) + 4 * columns * WIDTH


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, labels[:, None]).sum()


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return token_log_probs(hidden, weight, labels, chunk_tokens=CHUNK_TOKENS).log_probs.sum()


def chunked_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    result = token_log_probs(hidden, weight, labels, chunk_tokens=CHUNK_TOKENS, with_entropy=True)
    assert result.entropy is not None
    return result.log_probs.sum() + result.entropy.sum()


PATHS = {"plain": plain, "chunked": chunked, "chunked_entropy": chunked_entropy}


def resident_bytes(field: str) -> int:
    """Returns ``VmRSS`` (current) or ``VmHWM`` (peak since its reset) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(path: str, tokens: int, columns: int) -> dict[str, float]:
    """Measures one forward and backward pass in this process, after a small one that loads libraries."""

    def run(tokens: int, columns: int) -> tuple[float, int, int]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
        weight = (torch.randn(columns, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
        labels = torch.randint(columns, (tokens,), generator=generator)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        torch.autograd.backward(PATHS[path](hidden, weight, labels))
        return time.perf_counter() - start, resident_bytes("VmHWM"), before

    run(64, 512)
    seconds, peak, before = run(tokens, columns)
    return {"seconds": seconds, "peak_bytes": peak - before}


def measure_in_child(path: str, tokens: int, columns: int) -> dict[str, float] | None:
    """Measures in a child process; returns None if the plain path would need more than ``PLAIN_LIMIT``."""
    if path == "plain" and plain_bytes(tokens, columns) > PLAIN_LIMIT:
        return None
    arguments = ["--measure", path, str(tokens), str(columns)]
    command = [sys.executable, "-m", "benchmarks.log_probs", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def row(case: dict[str, Any]) -> dict[str, str]:
    def cell(path: str, field: str, unit: float, digits: int) -> str:
        return f"{case[path][field] / unit:,.{digits}f}" if case[path] else "-"

    cells = {"L x V": f"{case['tokens']} x {case['columns']}"}
    for path, name in (("plain", "all logits"), ("chunked", "chunks"), ("chunked_entropy", "chunks + entropy")):
        cells[f"{name}: s"] = cell(path, "seconds", 1, 2)
        cells[f"{name}: MiB"] = cell(path, "peak_bytes", 2**20, 0)
    cells["all logits: formula"] = f"{case['plain_formula_bytes'] / 2**20:,.0f}"
    cells["chunks: formula"] = f"{case['chunked_formula_bytes'] / 2**20:,.0f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--measure", nargs=3, metavar=("PATH", "TOKENS", "COLUMNS"), help="used by the benchmark itself"
    )
    case = parser.parse_args().measure
    if case:
        print(json.dumps(measure(case[0], int(case[1]), int(case[2]))))
        return
    cases = [
        {
            "tokens": tokens,
            "columns": columns,
            "plain_formula_bytes": plain_bytes(tokens, columns),
            "chunked_formula_bytes": chunk_bytes(columns, with_entropy=False),
            **{path: measure_in_child(path, tokens, columns) for path in PATHS},
        }
        for tokens, columns in SHAPES
    ]
    title = f"Forward + backward, hidden {WIDTH}, chunks of {CHUNK_TOKENS}, {torch.get_num_threads()} thread(s)"
    print_table(title, [row(case) for case in cases])
    print(f"- would need more than {PLAIN_LIMIT / 1e9:.0f} GB")
    write_result("log_probs", {"hidden_size": WIDTH, "chunk_tokens": CHUNK_TOKENS, "cases": cases})


if __name__ == "__main__":
    main()
