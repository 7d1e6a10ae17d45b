"""The traced memory of the actor beside the peaks that torch measured on a GPU, for the cases of benchmarks.gpu.

python -m benchmarks.plan_memory

Needs no GPU: the measured peaks (``torch.cuda.max_memory_allocated``) are read from the result files of benchmarks.gpu.
Its log-prob passes ran before the first optimizer step, without moments: 8 bytes per parameter less.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

from benchmarks.gpu import CASES, LAYERS, WITH_TRANSFORMER_ENGINE, Case
from benchmarks.result_table import RESULTS, print_table, write_result
from fipo_megatron.config import ActorConfig, Config, DataConfig, RewardConfig, RolloutConfig
from fipo_megatron.plan.rank_memory import RankMemory

MEASURED = ("gpu_nvidia_h200_torch.json", "gpu_nvidia_h200_te.json", "gpu_nvidia_h100_80gb_hbm3_te.json")
_MOMENTS = 8
_GIB = 2**30


def trace(case: Case) -> RankMemory:
    """Traces a case on one fake rank."""
    from fipo_megatron.plan.trace import Layers, trace_rank

    settings: dict[str, Any] = {"dtype": "bfloat16", "distributed_optimizer": True}
    settings |= (LAYERS | WITH_TRANSFORMER_ENGINE)[case.layers] | case.changes
    config = Config(
        actor=ActorConfig(token_budget=case.tokens, **settings),
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(max_response_tokens=case.tokens - 8),
        reward=RewardConfig(overlong_buffer_tokens=0),
    )
    layers: Layers = "torch" if case.layers == "torch" else "transformer_engine"
    return trace_rank(config, case.shape.architecture(), 0, 1, 1, layers)


def compare(case: Case, found: RankMemory, passes: dict[str, Any]) -> dict[str, Any]:
    """Returns traced and measured peaks of the log-prob pass and the training step, in bytes."""
    traced = {
        "log-probs": found.kept + found.log_probs.peak - _MOMENTS * found.gradients // 4,
        "training step": found.kept + max(found.update.peak, found.optimizer_step.peak),
    }
    return case.row() | {
        name: {"traced": size, "measured": passes[name]["peak_bytes"], "ratio": size / passes[name]["peak_bytes"]}
        for name, size in traced.items()
    }


def main() -> None:
    """Compares every measured case, prints the table and writes the result."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    results: list[dict[str, Any]] = []
    measured: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name in MEASURED:
        result = json.loads((RESULTS / name).read_text())
        for row in result["actor"]:
            if "passes" in row:
                key = tuple(row[key] for key in ("model", "layers", "tokens", "recompute"))
                measured.setdefault(key, {})[result["machine"]["device"]] = row["passes"]
    for case in CASES:
        if devices := measured.get(tuple(case.row().values())):
            found = trace(case)
            results += [{"device": name} | compare(case, found, passes) for name, passes in devices.items()]
    print_table("Traced beside measured peaks", [_row(result) for result in results])
    write_result("plan_memory", {"cases": results})


def _row(result: dict[str, Any]) -> dict[str, str]:
    row = {key: value for key, value in result.items() if isinstance(value, str)}
    for name in ("log-probs", "training step"):
        values = result[name]
        row[name] = f"{values['traced'] / _GIB:.2f} / {values['measured'] / _GIB:.2f} GiB ({values['ratio'] - 1:+.1%})"
    return row


if __name__ == "__main__":
    main()
