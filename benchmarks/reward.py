"""Verifiers: answers per second with one and two child processes, with and without symbolic algebra.

python -m benchmarks.reward
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.result_table import print_table, write_result
from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.reward.verifier_protocol import Answer

PAIRS = Path(__file__).parents[1] / "tests" / "reward" / "labelled_pairs.tsv"
PADDING = "Let me think about it. " * 800  # about 5,000 tokens before the answer


def answers() -> dict[str, list[Answer]]:
    """Returns integers, as in DAPO-Math-17k, and the labelled pairs, most of which need algebra."""
    pairs = [line.split("\t") for line in PAIRS.read_text().splitlines()]
    return {
        "integers": [Answer(f"{PADDING}\nAnswer: {n % 7}", "3") for n in range(2000)],
        "labelled pairs": [Answer(f"{PADDING}\nAnswer: {answer}", truth) for answer, truth, _ in pairs] * 2,
    }


async def rate(batch: list[Answer], processes: int) -> tuple[float, dict[str, int]]:
    """Measures answers per second, after one answer per child has started the children; returns the counts, too."""
    verifier = open_verifier(RewardConfig(verifier="math", verifier_processes=processes))
    try:
        await asyncio.gather(*(verifier.verify(batch[0]) for _ in range(processes)))
        start = time.perf_counter()
        await asyncio.gather(*(verifier.verify(answer) for answer in batch))
        return len(batch) / (time.perf_counter() - start), dict(verifier.counts)
    finally:
        await verifier.close()


def main() -> None:
    rows, results = [], []
    for name, batch in answers().items():
        for processes in (1, 2):
            per_second, counts = asyncio.run(rate(batch, processes))
            results.append({"answers": name, "processes": processes, "per_second": per_second, "counts": counts})
            rows.append({"answers": name, "processes": str(processes), "per second": f"{per_second:.0f}"})
    print_table("Verifier `math`", rows)
    write_result("reward", {"results": results})


if __name__ == "__main__":
    main()
