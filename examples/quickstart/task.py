"""The quickstart's task, the last digit of a sum: builds a starting model, SFT examples and training problems.

Answers are terse (``Answer: 5``, mostly a guess), or have a line per addition before the answer. The starting model
rarely gives the second kind; FIPO must discover that it earns more reward.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.quickstart.tiny_model import build_model

HELD_OUT, EXAMPLES, PROBLEMS = 256, 19_200, 20_000
WARM = (0.1, 0.2, 0.7)
"""Fractions of terse, partly worked and fully worked examples at first: the model learns to add."""
STARTING = (0.75, 0.17, 0.08)
"""Fractions in the last quarter: the model becomes terse and often wrong."""
WRONG_LINE = 0.03
"""Probability of an error in a line of a worked answer."""

Digits = tuple[int, ...]


def digits(rng: random.Random) -> Digits:
    """Draws four to seven numbers, small ones after the first; larger ones are too hard at the start."""
    return (rng.randint(0, 9), *(rng.randint(1, 4) for _ in range(rng.randint(3, 6))))


def question(numbers: Digits) -> str:
    """Returns the prompt for a sum."""
    return f"Last digit of {'+'.join(map(str, numbers))}?"


def worked(numbers: Digits, lines: int, rng: random.Random) -> str:
    """Returns an answer with ``lines`` additions; each may be wrong, and later ones build on the error."""
    total, text = numbers[0], []
    for number in numbers[1 : lines + 1]:
        new = (total + number) % 10
        if rng.random() < WRONG_LINE:
            new = (new + rng.randint(1, 9)) % 10
        text.append(f"{total}+{number}={new}")
        total = new
    return "\n".join([*text, f"Answer: {(total + sum(numbers[lines + 1 :])) % 10}"])


def example(numbers: Digits, fractions: tuple[float, float, float], rng: random.Random) -> str:
    """Draws an answer of one of the three kinds."""
    kind = rng.choices(("terse", "partly", "fully"), fractions)[0]
    additions = len(numbers) - 1
    return worked(numbers, {"terse": 0, "partly": rng.randint(1, additions - 1), "fully": additions}[kind], rng)


def build(directory: Path, seed: int) -> None:
    """Writes ``model/`` (random weights), ``examples.jsonl``, ``problems.jsonl`` and ``held_out.jsonl``."""
    directory.mkdir(parents=True, exist_ok=True)
    held_out: dict[Digits, None] = {}
    rng = random.Random(12345)
    while len(held_out) < HELD_OUT:
        held_out[digits(rng)] = None
    rng = random.Random(seed)

    def fresh() -> Digits:
        while (numbers := digits(rng)) in held_out:
            pass
        return numbers

    examples = []
    for number in range(EXAMPLES):
        numbers = fresh()
        fractions = WARM if number < 0.75 * EXAMPLES else STARTING
        examples.append(
            {"id": f"{number:05}", "prompt": question(numbers), "response": example(numbers, fractions, rng)}
        )
    _write(directory / "examples.jsonl", examples)
    _write(directory / "problems.jsonl", map(_problem, {fresh(): None for _ in range(PROBLEMS)}))
    _write(directory / "held_out.jsonl", map(_problem, held_out))
    build_model(
        directory / "model", [f"user\n{e['prompt']}\nassistant\n{e['response']}" for e in examples[-2000:]], seed
    )


def _problem(numbers: Digits) -> dict[str, Any]:
    return {"id": "".join(map(str, numbers)), "prompt": question(numbers), "answer": str(sum(numbers) % 10)}


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
