"""Idle time of the data-parallel ranks: micro-batches balanced by FLOPs beside micro-batches balanced by tokens.

    python -m benchmarks.balance

Steps of 8 mini-batches with log-normal response lengths. The layouts are two of examples/layouts, one for longer
responses, and a mixture. The idle fraction is the share of the training passes in which an average rank waits for the
slowest: by model FLOPs, and by the plan's time of an H100 (:mod:`fipo_megatron.plan.training_time`), where attention
has an efficiency of its own. ``by tokens`` is the rule that packed before: each sequence goes into the micro-batch with
the fewest tokens, and the first rank gets the fullest micro-batch of every round.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.plan_time import architecture
from benchmarks.result_table import print_table, write_result
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.config.padding import token_multiple
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import MiniBatch, imbalance, plan_micro_batches
from fipo_megatron.observe.devices import device
from fipo_megatron.observe.throughput import sequence_cost
from fipo_megatron.plan.efficiencies import Rates
from fipo_megatron.plan.training_time import ActorTime, Packing

DATA_PARALLEL = (2, 4, 8, 16)
MINI_BATCHES = 8
_SP = {"sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """A model, a layout and a distribution of response lengths.

    Attributes:
        model: Name of the model.
        budget: ``actor.token_budget``.
        responses: Responses of a mini-batch.
        parallel: Values of ``actor.parallel``.
        median: Median length of the responses.
        limit: Largest length.
        spread: Standard deviation of the logarithm of the length.
    """

    model: str
    budget: int
    responses: int
    parallel: dict[str, Any] = field(default_factory=dict)
    median: int = 4096
    limit: int = 20480
    spread: float = 0.8

    @property
    def actor(self) -> ActorConfig:
        """Section of the configuration."""
        values: dict[str, Any] = {
            "token_budget": self.budget,
            "parallel": ParallelConfig(**self.parallel),
            "recompute": "selective",
        }
        return ActorConfig(**values)


CASES = (
    Case("Qwen2.5-32B", 32_768, 1024, {"tensor_parallel": 8} | _SP),
    Case("Qwen2.5-7B", 24_576, 2048, {"tensor_parallel": 2} | _SP),
    Case("Qwen2.5-32B", 131_072, 1024, {"tensor_parallel": 8, "context_parallel": 4} | _SP, 16_384, 131_072),
    Case("Qwen3-30B-A3B", 32_768, 1024, {"expert_parallel": 8}),
)


def by_tokens(lengths: Sequence[int], members: Sequence[int], budget: int, ranks: int) -> MiniBatch:
    """Returns the micro-batches of a mini-batch under the rule that counts tokens."""
    count = -(-sum(lengths[i] for i in members) // (budget * ranks)) * ranks
    while True:
        loads = [(0, number) for number in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in sorted(members, key=lambda i: (-lengths[i], i)):
            load, number = loads[0]
            bins[number].append(i)
            heapq.heapreplace(loads, (load + lengths[i], number))
        if max(loads)[0] <= budget:
            break
        count += ranks
    fullest_first = [tuple(bins[number]) for _, number in sorted(loads, key=lambda entry: (-entry[0], entry[1]))]
    return MiniBatch(tuple(tuple(fullest_first[rank::ranks]) for rank in range(ranks)))


def planned_idle(case: Case, plan: Sequence[MiniBatch], lengths: Sequence[int], ranks: int) -> float:
    """Returns the idle fraction of the training passes by the plan's time of an H100."""
    timed = ActorTime(architecture(case.model), case.actor, device("h100"), 8, ranks, Rates())
    layout, multiple = CpLayout(case.actor.parallel.context_parallel), token_multiple(case.actor)
    busy = waiting = 0.0
    for mini_batch in plan:
        sizes = [[[lengths[i] for i in members] for members in rank] for rank in mini_batch.micro_batches]
        tokens = np.array([[layout.padded_total(sum(micro), multiple) for micro in rank] for rank in sizes], float)
        pairs = np.array([[sum(n * n for n in micro) / 2 for micro in rank] for rank in sizes])
        packing = Packing(tokens, pairs, int(tokens.sum()), float(pairs.sum()))
        mean, wait, _ = timed.mini_batch(timed.training(packing))
        busy, waiting = busy + mean, waiting + wait
    return waiting / (busy + waiting)


def measure(case: Case, ranks: int) -> dict[str, Any]:
    """Plans the mini-batches of a step under both rules."""
    if case.parallel.get("expert_parallel", 1) > ranks:
        case = replace(case, parallel={"expert_parallel": ranks})
    rng = np.random.default_rng(ranks)
    count = case.responses * MINI_BATCHES
    sampled = np.minimum(rng.lognormal(np.log(case.median), case.spread, count), case.limit).astype(int)
    layout = CpLayout(case.actor.parallel.context_parallel)
    lengths = [layout.padded_length(int(length)) for length in sampled]
    mini_batches = [range(first, first + case.responses) for first in range(0, count, case.responses)]
    start = time.perf_counter()
    cost = sequence_cost(architecture(case.model))
    new = plan_micro_batches(lengths, mini_batches, token_budget=case.budget, data_parallel_size=ranks, cost=cost)
    seconds = time.perf_counter() - start
    plans = {
        "by tokens": [by_tokens(lengths, members, case.budget, ranks) for members in mini_batches],
        "by FLOPs": new,
    }
    found: dict[str, Any] = {
        "model": case.model,
        "parallel": case.parallel,
        "token_budget": case.budget,
        "median": case.median,
        "limit": case.limit,
        "data_parallel": ranks,
        "plan_seconds": seconds,
    }
    lockstep = case.actor.parallel.data_ranks_in_lockstep
    for rule, plan in plans.items():
        ratio = imbalance(plan, lengths, cost, lockstep=lockstep)
        found[rule] = {
            "micro_batches": sum(len(mini_batch.micro_batches[0]) for mini_batch in plan),
            "cost_imbalance": ratio,
            "idle_fraction": 1 - 1 / ratio,
            "planned_idle_fraction": planned_idle(case, plan, lengths, ranks),
        }
    return found


def main() -> None:
    """Plans every case at every data-parallel size, prints the table and writes the result."""
    results = [measure(case, ranks) for case in CASES for ranks in DATA_PARALLEL]
    print_table("Idle fraction of an average rank, by tokens → by FLOPs", [_row(result) for result in results])
    write_result("balance", {"mini_batches": MINI_BATCHES, "cases": results})


def _row(result: dict[str, Any]) -> dict[str, str]:
    old, new = result["by tokens"], result["by FLOPs"]
    return {
        "model": result["model"],
        "lengths": f"{result['median']:,} … {result['limit']:,}",
        "DP": str(result["data_parallel"]),
        "micro-batches": f"{old['micro_batches']} → {new['micro_batches']}",
        "max / mean": f"{old['cost_imbalance']:.4f} → {new['cost_imbalance']:.4f}",
        "idle, FLOPs": f"{old['idle_fraction']:.2%} → {new['idle_fraction']:.2%}",
        "idle, plan's time": f"{old['planned_idle_fraction']:.2%} → {new['planned_idle_fraction']:.2%}",
        "plan": f"{result['plan_seconds']:.2f} s",
    }


if __name__ == "__main__":
    main()
