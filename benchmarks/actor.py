"""The Megatron actor: memory by sequence length, a long sequence on two ranks, and step time by layout.

A small random Qwen3 on this machine's CPU: float32, hidden 128, one thread per rank. Every row of the memory tables is
measured in its own process: one sequence, ``MegatronActor.log_probs`` and then ``update``, after a step of 64 tokens
that creates the optimizer state and loads libraries. Memory is the kernel's resident peak (``VmHWM``), reset at the
begin of a phase, above the resident memory before the pass; freed memory is returned to the system at once.

The phases are the decoder up to the hidden states, then the head: log-probs, entropy and, in a training step, loss and
backward down to the gradient of the hidden states. "all logits" is the same actor with a head that holds the float32
logits of all tokens.

    python -m benchmarks.actor
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.log_probs import PLAIN_LIMIT, SHAPES, WIDTH, plain_bytes
from benchmarks.result_table import print_table, write_result
from fipo_megatron.config import ActorConfig

CHUNK_TOKENS = ActorConfig().log_prob_chunk_tokens
CONTEXT_TOKENS, CONTEXT_COLUMNS, CONTEXT_RANKS = 16_384, (32_768, 152_064), 2
CONTEXT_LIMIT = 4 * 2**30

WARM_UP_TOKENS = 64
UPDATES = 3

LAYOUT_COLUMNS = 8192
LAYOUT_TOKENS = (1024, 832, 704, 576, 448, 320, 128, 64)
LAYOUT_BUDGET = 1024

TP2, SP = {"tensor_parallel": 2}, {"sequence_parallel": True}
# World size -> name -> (parallel sizes, changes to the actor's settings, whether the model is a mixture).
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any], bool]]] = {
    1: {"one rank": ({}, {}, False), "one rank, mixture": ({}, {}, True)},
    2: {
        "TP2": (TP2, {}, False),
        "TP2+SP": (TP2 | SP, {}, False),
        "PP2": ({"pipeline_parallel": 2}, {}, False),
        "CP2": ({"context_parallel": 2}, {}, False),
        "DP2": ({}, {}, False),
        "DP2, distributed optimizer": ({}, {"distributed_optimizer": True}, False),
        "DP2, mixture": ({}, {}, True),
        "EP2, mixture": ({"expert_parallel": 2}, {}, True),
    },
}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
PASSES = {"log_probs": "Log-prob pass", "update": "Training step"}

# glibc would keep freed blocks, and the next phase would appear smaller than it is.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def worker(arguments: tuple[Any, ...], ranks: int | None = None, environment: dict[str, str] | None = None) -> Any:
    """Runs ``benchmarks.actor_worker``, in one process or under torchrun on ``ranks`` ranks, and returns its result."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    launcher = () if ranks is None else (*TORCHRUN, f"--nproc-per-node={ranks}")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "result.json"
        command = [sys.executable, *launcher, "-m", "benchmarks.actor_worker", out, *arguments]
        subprocess.run([str(part) for part in command], env=os.environ | settings | (environment or {}), check=True)
        return json.loads(out.read_text())


def chunk_bytes(columns: int) -> int:
    """Returns the bytes of one chunk's logits."""
    return 4 * CHUNK_TOKENS * columns


def measure_memory(tokens: int, columns: int) -> dict[str, Any]:
    """Measures one sequence; ``plain`` is None if it would need more than ``PLAIN_LIMIT``."""
    fits = plain_bytes(tokens, columns) <= PLAIN_LIMIT
    return {
        "tokens": tokens,
        "columns": columns,
        "hidden_bytes": 4 * tokens * WIDTH,
        "plain_formula_bytes": plain_bytes(tokens, columns),
        "chunk_logits_bytes": chunk_bytes(columns),
        "chunked": worker(("memory", "chunked", tokens, columns), environment=RETURN_FREED),
        "plain": worker(("memory", "plain", tokens, columns), environment=RETURN_FREED) if fits else None,
    }


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def head_beyond_hidden(case: dict[str, Any], name: str) -> int:
    """Returns the head's peak above the decoder's output and, in a training step, above the gradient of that size."""
    peak: int = case["chunked"][name]["head_peak_bytes"]
    hidden: int = case["hidden_bytes"]
    return peak - (hidden if name == "update" else 0)


def memory_row(case: dict[str, Any], name: str) -> dict[str, str]:
    found, plain = case["chunked"][name], case["plain"]
    decoder = {
        "log_probs": {"decoder": found["decoder_peak_bytes"]},
        "update": {"decoder, forward": found["decoder_kept_bytes"], "decoder, backward": found["rest_peak_bytes"]},
    }[name]
    return {
        "L x V": f"{case['tokens']} x {case['columns']}",
        "hidden states": mib(case["hidden_bytes"]),
        **{column: mib(value) for column, value in decoder.items()},
        "KiB/token": f"{max(decoder.values()) / case['tokens'] / 1024:.1f}",
        "head": f"{head_beyond_hidden(case, name) / 2**20:,.1f}",
        "peak": mib(found["peak_bytes"]),
        "all logits: peak": mib(plain[name]["peak_bytes"]) if plain else "-",
        "all logits: 3·4·L·V": mib(case["plain_formula_bytes"]),
        "s": f"{found['seconds']:.1f}",
        "all logits: s": f"{plain[name]['seconds']:.1f}" if plain else "-",
    }


def print_memory(cases: list[dict[str, Any]]) -> dict[str, int]:
    """Prints the tables; returns the growth of the head in bytes from the shortest to the longest sequence."""
    growth = {}
    for name, title in PASSES.items():
        print_table(f"{title}, chunks of {CHUNK_TOKENS}: MiB above before", [memory_row(case, name) for case in cases])
        same = sorted((case for case in cases if case["columns"] == SHAPES[0][1]), key=lambda case: int(case["tokens"]))
        short, long = same[0], same[-1]
        first, last = head_beyond_hidden(short, name), head_beyond_hidden(long, name)
        growth[name] = last - first
        per_token = growth[name] / (long["tokens"] - short["tokens"])
        print(
            f"head, beyond hidden states: {mib(first)} MiB at {short['tokens']} tokens, {mib(last)} MiB at "
            f"{long['tokens']}: {per_token:+.0f} bytes per token; logits of a chunk: {mib(short['chunk_logits_bytes'])}"
        )
    print(
        f"- would need more than {PLAIN_LIMIT / 1e9:.0f} GB. The log-prob pass holds a chunk twice, for the entropy; "
        "the training step once, beside\nthe gradient of the output weight. The decoder's memory is linear in L "
        "(KiB/token constant) and does not depend on V."
    )
    return growth


def measure_context(columns: int) -> dict[str, Any]:
    found = worker(("context", CONTEXT_TOKENS, columns), ranks=CONTEXT_RANKS)
    worst = max(rank["peak_bytes"] for rank in found["ranks"])
    sizes = {"tokens": CONTEXT_TOKENS, "columns": columns, "limit_bytes": CONTEXT_LIMIT}
    return {**sizes, **found, "largest_peak_bytes": worst, "passed": worst < CONTEXT_LIMIT}


def print_context(cases: list[dict[str, Any]]) -> None:
    print_table(
        f"One sequence of {CONTEXT_TOKENS} tokens, context parallel {CONTEXT_RANKS}, log_probs and update: MiB "
        "resident, Python and PyTorch included",
        [
            {
                "V": f"{case['columns']}",
                "rank": f"{number}",
                "model built": mib(rank["model_built_bytes"]),
                "peak": mib(rank["peak_bytes"]),
                "limit": mib(case["limit_bytes"]),
                "": "PASS" if rank["peak_bytes"] < case["limit_bytes"] else "FAIL",
                "log_probs: s": f"{rank['log_probs_s']:.1f}",
                "update: s": f"{rank['update_s']:.1f}",
            }
            for case in cases
            for number, rank in enumerate(case["ranks"])
        ],
    )


def measure_layouts() -> list[dict[str, Any]]:
    """Measures all layouts of each world size in one job."""
    found = [{"ranks": ranks, **case} for ranks in LAYOUTS for case in worker(("layouts",), ranks=ranks)]
    base = {case["model"]: case["median_s"] for case in found if case["ranks"] == 1}
    return [case | {"relative_to_one_rank": base[case["model"]] / case["median_s"]} for case in found]


def print_layouts(cases: list[dict[str, Any]]) -> None:
    tokens = sum(LAYOUT_TOKENS)
    print_table(
        f"Update of {tokens} tokens in {len(LAYOUT_TOKENS)} sequences, at most {LAYOUT_BUDGET} per micro-batch, V = "
        f"{LAYOUT_COLUMNS}, 4 layers: median of {UPDATES}",
        [
            {
                "layout": case["layout"],
                "model": case["model"],
                "ranks": f"{case['ranks']}",
                "micro-batches per rank": f"{case['micro_batches']}",
                "s": f"{case['median_s']:.2f}",
                "fastest - slowest": f"{min(case['seconds']):.2f} - {max(case['seconds']):.2f}",
                "tokens/s": f"{tokens / case['median_s']:,.0f}",
                "x one rank": f"{case['relative_to_one_rank']:.2f}",
            }
            for case in cases
        ],
    )


def main() -> None:
    memory = [measure_memory(tokens, columns) for tokens, columns in SHAPES]
    growth = print_memory(memory)
    context = [measure_context(columns) for columns in CONTEXT_COLUMNS]
    print_context(context)
    layouts = measure_layouts()
    print_layouts(layouts)
    settings = {"hidden_size": WIDTH, "chunk_tokens": CHUNK_TOKENS, "warm_up_tokens": WARM_UP_TOKENS}
    result = {"memory": memory, "head_growth_bytes": growth, "context_parallel": context, "layouts": layouts}
    write_result("actor", {**settings, **result})


if __name__ == "__main__":
    main()
