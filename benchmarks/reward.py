"""Verifiers: answers per second with one child process and with two, and where symbolic algebra is needed.

python -m benchmarks.reward
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.report import print_table, write_result
from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.verifier import Answer, open_verifier

PAIRS = Path(__file__).parents[1] / "tests" / "reward" / "labelled_pairs.tsv"
PADDING = "Let me think about it. " * 800  # about 5,000 tokens before the answer


def answers() -> dict[str, list[Answer]]:
    """Integers, as in DAPO-Math-17k, and the labelled pairs, most of which need algebra."""
    pairs = [line.split("\t") for line in PAIRS.read_text().splitlines()]
    return {
        "integers": [Answer(f"{PADDING}\nAnswer: {n % 7}", "3") for n in range(2000)],
        "labelled pairs": [Answer(f"{PADDING}\nAnswer: {answer}", truth) for answer, truth, _ in pairs] * 2,
    }


async def rate(given: list[Answer], processes: int) -> tuple[float, dict[str, int]]:
    """Answers per second after a first one, which starts the children."""
    verifier = open_verifier(RewardConfig(verifier="math", verifier_processes=processes))
    try:
        await asyncio.gather(*(verifier.verify(given[0]) for _ in range(processes)))
        start = time.perf_counter()
        await asyncio.gather(*(verifier.verify(answer) for answer in given))
        return len(given) / (time.perf_counter() - start), dict(verifier.counts)
    finally:
        await verifier.close()


def main() -> None:
    rows, results = [], []
    for name, given in answers().items():
        for processes in (1, 2):
            per_second, counts = asyncio.run(rate(given, processes))
            results.append({"answers": name, "processes": processes, "per_second": per_second, "counts": counts})
            rows.append({"answers": name, "processes": str(processes), "per second": f"{per_second:.0f}"})
    print_table("Verifier `math`", rows)
    write_result("reward", {"results": results})


if __name__ == "__main__":
    main()
