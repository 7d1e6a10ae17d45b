"""Seconds, memory and bytes sent from the sampler's output to packed micro-batches, with synthetic responses.

    python -m benchmarks.trajectories [--responses 8192] [--tokens 10000]

Ranks of a step without engine and model: each makes its share of the responses as the sampler does, scores them,
computes advantages, scatters them to the ranks that train on them (gloo), and packs each mini-batch. Cases: 2 and 4
data-parallel ranks, and 2 data-parallel ranks of 2 ranks each, which receive the same responses. Memory is the peak of
a rank's resident memory above that before the first response.

``--label before --hold-mini-batch`` measured the commit before this file, whose actor packed all micro-batches of a
mini-batch at once; its figures stay in the result file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.result_table import RESULTS, print_table, write_result
from fipo_megatron.config import AlgorithmConfig
from fipo_megatron.data.batch import compute_advantages
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import pack, plan_micro_batches
from fipo_megatron.data.trajectory import Group, Prompt, Trajectory
from fipo_megatron.rollout.scatter import Routes, scatter_trajectories

SAMPLES, MINI_BATCHES, BUDGET = 16, 8, 32_768
CASES = ((2, 1), (4, 1), (4, 2))
"""Ranks, and ranks that train on the same responses."""


class Meter:
    """Measures the seconds of each part, the peak of the resident memory, and the bytes that a rank sends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.sent = 0
        self._before = _status("VmRSS")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures a part."""
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        dist.barrier()
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peaks[name] = _status("VmHWM") - self._before

    def count_sent(self) -> None:
        """Counts what goes to other ranks from here on."""
        exchange, broadcast = dist.all_to_all_single, dist.broadcast

        def counted_exchange(
            output: Any, sent: Any, incoming: Any = None, outgoing: Any = None, group: Any = None
        ) -> Any:
            size, ranks, rank = sent.numel() * sent.element_size(), dist.get_world_size(group), dist.get_rank(group)
            self.sent += size - (outgoing[rank] if outgoing else size // ranks)
            return exchange(output, sent, incoming, outgoing, group=group)

        def counted_broadcast(tensor: Any, source: int, group: Any) -> Any:
            if dist.get_rank() == source:
                self.sent += tensor.numel() * tensor.element_size() * (dist.get_world_size(group) - 1)
            return broadcast(tensor, source, group=group)

        for name, counted in (("all_to_all_single", counted_exchange), ("broadcast", counted_broadcast)):
            setattr(dist, name, counted)


def _status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def sample(prompts: range, tokens: int) -> list[Group]:
    """Returns scored groups, made as the sampler makes them: arrays of the engine, a trajectory, its score."""
    groups = []
    for number in prompts:
        rng = np.random.default_rng(number)
        prompt = Prompt(f"p{number:06}", rng.integers(0, 150_000, 150, np.int32), "42")
        found = []
        for sample in range(SAMPLES):
            ids = rng.integers(0, 150_000, tokens, np.int32)
            log_probs = -rng.random(tokens, np.float32)
            unscored = Trajectory(prompt, sample, ids, log_probs, np.ones(tokens, np.bool_))
            found.append(replace(unscored, reward=float(sample % 2), accuracy=sample % 2))
        groups.append(Group(prompt, tuple(found)))
    return groups


def worker(responses: int, tokens: int, replica: int, out: Path, *, hold: bool) -> None:
    """Measures one rank."""
    dist.init_process_group("gloo")
    rank, data_size = dist.get_rank(), dist.get_world_size() // replica
    routes, meter = Routes.build(rank // replica), Meter()
    per_leader = responses // SAMPLES // data_size
    mine = range(routes.data_rank * per_leader, (routes.data_rank + 1) * per_leader)
    with meter.part("sample"):
        sampled = sample(mine, tokens) if routes.among_leaders is not None else []
    with meter.part("advantages"):
        groups = compute_advantages(sampled, AlgorithmConfig())
    names = [f"p{number:06}/{sample}" for number in range(per_leader * data_size) for sample in range(SAMPLES)]
    order = np.random.default_rng(0).permutation(per_leader * data_size)
    mini_batches = [
        [int(group) * SAMPLES + sample for group in part for sample in range(SAMPLES)]
        for part in np.array_split(order, MINI_BATCHES)
    ]
    plan = plan_micro_batches(
        [tokens + 150] * len(names), mini_batches, token_budget=BUDGET, data_parallel_size=data_size
    )
    meter.count_sent()
    with meter.part("scatter"):
        trajectories = scatter_trajectories(routes, groups, names, plan)
    with meter.part("pack"):
        for mini_batch in plan:
            packed = (
                pack([trajectories[i] for i in members], CpLayout()).slice(CpLayout())
                for members in mini_batch.micro_batches[routes.data_rank]
            )
            if hold:
                list(packed)
            else:
                for _ in packed:
                    pass
    measured = {"seconds": meter.seconds, "peak_bytes": meter.peaks, "sent_bytes": meter.sent}
    (out / f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def measure(ranks: int, replica: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the ranks of a case and returns the largest figures of any rank."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command += ["benchmarks.trajectories", f"--responses={options.responses}", f"--tokens={options.tokens}"]
        command += [f"--replica={replica}", f"--worker={directory}"] + ["--hold-mini-batch"] * options.hold_mini_batch
        subprocess.run(command, check=True)
        found = [json.loads(file.read_text()) for file in sorted(Path(directory).glob("*.json"))]

    def largest(of: Callable[[dict[str, Any]], float]) -> float:
        return max(map(of, found))

    parts = list(found[0]["seconds"])
    return {
        "ranks": ranks,
        "replica": replica,
        "responses": options.responses,
        "tokens": options.tokens,
        "seconds": {part: largest(lambda one: one["seconds"][part]) for part in parts},  # noqa: B023
        "peak_bytes": {part: largest(lambda one: one["peak_bytes"][part]) for part in parts},  # noqa: B023
        "sent_bytes": largest(lambda one: one["sent_bytes"]),
    }


def main() -> None:
    """Measures every case, prints the table and writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--label", default="now")
    parser.add_argument("--hold-mini-batch", action="store_true")
    parser.add_argument("--replica", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.responses, options.tokens, options.replica, options.worker, hold=options.hold_mini_batch)
        return
    file = RESULTS / "trajectories.json"
    known = json.loads(file.read_text())["cases"] if file.exists() else {}
    known[options.label] = [measure(*case, options) for case in CASES]
    rows = [_row(label, case) for label, cases in known.items() for case in cases]
    print_table("Largest figure of any rank", sorted(rows, key=lambda row: (row["ranks"], row["label"])))
    write_result("trajectories", {"cases": known})


def _row(label: str, case: dict[str, Any]) -> dict[str, str]:
    data = case["ranks"] // case["replica"]
    row = {"ranks": f"{case['ranks']}: DP {data}", "label": label}
    row |= {f"{part}, s": f"{seconds:.1f}" for part, seconds in case["seconds"].items()}
    row |= {f"{part}, MiB": f"{size / 2**20:,.0f}" for part, size in case["peak_bytes"].items()}
    return row | {"sent, MiB": f"{case['sent_bytes'] / 2**20:,.0f}"}


if __name__ == "__main__":
    main()
