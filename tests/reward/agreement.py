"""Agreement of the ``math`` verifier with the labels of pairs.tsv, for each kind.

python -m tests.reward.agreement
"""

from __future__ import annotations

import collections
import csv
from pathlib import Path

from fipo_megatron.reward import answers

PAIRS = Path(__file__).with_name("pairs.tsv")
Pair = tuple[str, str, str, bool]
"""Kind, response, right answer, and whether a teacher of mathematics calls the response right."""


def pairs() -> list[Pair]:
    """Returns the labelled pairs. Responses and right answers are stored with Python's unicode escapes."""
    with PAIRS.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [
        (kind, response.encode().decode("unicode_escape"), truth.encode().decode("unicode_escape"), label == "1")
        for kind, response, truth, label in rows
    ]


def agrees(pair: Pair) -> bool:
    """Returns whether the verdict is the label."""
    _, response, truth, label = pair
    return answers.math(response, truth)[0] == label


def main() -> None:
    """Prints the agreement for each kind, and the pairs that disagree."""
    counts: dict[str, list[bool]] = collections.defaultdict(list)
    for pair in pairs():
        counts[pair[0]].append(agrees(pair))
        if not counts[pair[0]][-1]:
            print("disagrees:", *map(repr, pair))
    for kind, agreed in counts.items():
        print(f"{kind:12} {sum(agreed):3} of {len(agreed):3}")
    total = [agreed for kind in counts.values() for agreed in kind]
    print(f"{'all':12} {sum(total):3} of {len(total):3}, {sum(total) / len(total):.1%}")


if __name__ == "__main__":
    main()
