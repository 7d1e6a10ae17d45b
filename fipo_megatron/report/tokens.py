"""Selection of the responses for the token view, and the values of their tokens."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fipo_megatron.report.runs import Run, parse

NUMBERS = ("behaviour_log_prob", "old_log_prob", "shift", "future_kl", "weight", "entropy")
"""Parallel lists of values in a row's ``tokens``, beside ``text``."""

PLAIN = ("prompt_id", "sample", "data_source", "reward", "accuracy", "advantage", "finish_reason", "mini_batch")
"""Fields of a row that are copied unchanged."""

MAX_CHARACTERS = 20_000
"""Maximum number of characters of a prompt, and of a response without token values."""

T = TypeVar("T")
_STEP = re.compile(rb'^\{"step": ?(\d+)')
_ROWS_PER_STEP = 64


@dataclass(frozen=True)
class Place:
    """Position of a row: a file and a byte offset."""

    file: Path
    offset: int


def chosen_responses(run: Run, limit: int, token_limit: int) -> tuple[list[dict[str, Any]], str]:
    """Selects responses evenly over the steps, both right and wrong ones, those with token values first.

    Args:
        run: Run whose ``trajectories/`` are read: one pass over all lines, then the rows of the selected steps.
        limit: Maximum number of responses.
        token_limit: Maximum number of tokens shown of each response, from its beginning.

    Returns:
        The responses in the order of their steps, and a sentence about what was left out.
    """
    places = _by_step(run.path / "trajectories")
    total = sum(map(len, places.values()))
    if not total or limit < 1:
        return [], f"{run.name}: {total or 'no'} responses are recorded" + (", none is shown." if total else ".")
    steps = _evenly(sorted(places), max(1, limit // 2))
    kept = _pick({step: _rows(_evenly(places[step], _ROWS_PER_STEP)) for step in steps}, limit)
    shown = [_shown(row, token_limit) for row in kept]
    text = f"{run.name}: {len(shown)} of {total} recorded responses are shown, from {len({r['step'] for r in shown})}"
    text += f" of {len(places)} steps, selected evenly over the steps, right and wrong ones in turn"
    cut = sum(1 for row in shown if row["cut"])
    return shown, text + (
        f"; {cut} of them are cut at {token_limit} tokens or {MAX_CHARACTERS} characters." if cut else "."
    )


def _by_step(folder: Path) -> dict[int, list[Place]]:
    """Returns the positions of all rows by step; incomplete lines are left out."""
    places: dict[int, list[Place]] = defaultdict(list)
    for file in sorted(folder.glob("*.jsonl")):
        with file.open("rb") as lines:
            offset = 0
            for line in lines:
                match = _STEP.match(line)
                step = int(match[1]) if match else (parse(line) or {}).get("step")
                if isinstance(step, int) and line.rstrip().endswith(b"}"):
                    places[step].append(Place(file, offset))
                offset += len(line)
    return places


def _evenly(things: list[T], count: int) -> list[T]:
    """Selects ``count`` evenly spaced items, including the first and the last."""
    if len(things) <= count:
        return things
    if count == 1:
        return things[-1:]
    return [things[round(i * (len(things) - 1) / (count - 1))] for i in range(count)]


def _rows(places: list[Place]) -> list[dict[str, Any]]:
    rows = []
    for place in places:
        with place.file.open("rb") as lines:
            lines.seek(place.offset)
            row = parse(lines.readline())
        if row is not None and isinstance(row.get("response"), str):
            rows.append(row)
    return rows


def _pick(by_step: dict[int, list[dict[str, Any]]], limit: int) -> list[dict[str, Any]]:
    """Selects rows from the steps in turn: a right one, a wrong one, then the rest, up to ``limit``."""
    queues = []
    for rows in by_step.values():
        rows = sorted(rows, key=lambda row: not isinstance(row.get("tokens"), dict))
        right = [row for row in rows if row.get("accuracy")]
        wrong = [row for row in rows if not row.get("accuracy")]
        both = min(len(right), len(wrong))
        turns = [row for pair in zip(right[:both], wrong[:both], strict=True) for row in pair]
        queues.append(turns + right[both:] + wrong[both:])
    kept: list[dict[str, Any]] = []
    for turn in range(max(map(len, queues), default=0)):
        layer = [queue[turn] for queue in queues if turn < len(queue)]
        kept += _evenly(layer, limit - len(kept)) if len(kept) < limit else []
    return sorted(kept, key=lambda row: int(row["step"]))


def _shown(row: dict[str, Any], token_limit: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"step": row["step"], "ground_truth": str(row.get("ground_truth", ""))}
    shown |= {name: row[name] for name in PLAIN if isinstance(row.get(name), str | int)}
    shown |= {name: _rounded(row[name]) for name in PLAIN if isinstance(row.get(name), float)}
    response, prompt, tokens = row["response"], str(row.get("prompt", "")), _tokens(row.get("tokens"), token_limit)
    length = row.get("response_tokens")
    count = len(row["tokens"]["text"]) if tokens else None
    shown["response_tokens"] = length if isinstance(length, int) else count
    shown["prompt"] = prompt[:MAX_CHARACTERS]
    shown["versions"] = _versions(row.get("versions"))
    shown["tokens"] = tokens
    shown["response"] = "" if tokens else response[:MAX_CHARACTERS]
    shown["cut"] = bool(count and count > token_limit) or (not tokens and len(response) > MAX_CHARACTERS)
    return shown


def _versions(versions: Any) -> list[list[int]]:
    """Returns the valid pairs of weight version and number of tokens."""
    pairs = versions if isinstance(versions, list) else []
    return [
        pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
    ]


def _tokens(tokens: Any, limit: int) -> dict[str, list[Any]] | None:
    """Returns the lists of token values, cut and rounded; None if they are missing or malformed."""
    if not isinstance(tokens, dict) or not isinstance(tokens.get("text"), list) or not tokens["text"]:
        return None
    shown: dict[str, list[Any]] = {"text": [str(text) for text in tokens["text"][:limit]]}
    for name in NUMBERS:
        numbers = tokens.get(name)
        if isinstance(numbers, list) and len(numbers) == len(tokens["text"]):
            shown[name] = [_rounded(number) for number in numbers[:limit]]
    return shown


def _rounded(number: Any) -> float | None:
    if not isinstance(number, int | float) or not math.isfinite(number):
        return None
    return float(f"{number:.4g}")
