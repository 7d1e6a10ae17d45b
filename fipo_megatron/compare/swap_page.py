"""The page of ``fipo compare swap``: the curves, the shares that recover the gap, and responses with swaps marked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fipo_megatron.compare.swap_points import Point, PointFiles, curves_of, points_of
from fipo_megatron.config import CompareConfig
from fipo_megatron.report import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = Path(__file__).parent / "page"
RESPONSES, TOKENS = 6, 4000
"""Responses of each curve on the page, and tokens of each."""
_NONE, _SELECTED, _CHANGED = range(3)
"""Marks of tokens."""
_MEANINGS = (None, "not changed", "changed")


def render(
    result: Mapping[str, Any],
    compare: CompareConfig,
    files: PointFiles,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Returns the HTML of the page.

    Args:
        result: Content of ``swap.json``.
        compare: Configuration of the comparison.
        files: Files of the points.
        tokenizer: Tokenizer of the models.
    """
    shown: list[dict[str, Any]] = []
    for curve in curves_of(compare):
        points = points_of(compare, curve, result["seeds"][0])
        point = points[len(points) // 2]
        for row in _with_swaps(files.responses(point)):
            shown.append(_shown(row, point, len(shown), list(compare.select).index(curve.selector), tokenizer))
    data = {
        "runs": [{"name": name} for name in compare.select],
        "row_name": "response",
        "run_name": "Selector",
        "token_modes": [{"key": "mark", "label": "swapped tokens (dark: changed, light: not changed)", "centre": None}],
        "token_rows": [["swapped", "swapped"], ["quantity", "quantity"]],
        "responses": shown,
        "omitted": [
            f"The first {RESPONSES} responses with swapped tokens of each curve's middle point, up to {TOKENS} tokens "
            "of each; responses-*.jsonl has all of them."
        ],
        "result": result,
    }
    scripts = [frame.PARTS / "tokens.js", PARTS / "small_charts.js", PARTS / "swap.js"]
    return frame.assemble("Swapped tokens", PARTS / "swap.html", scripts, data)


def _with_swaps(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        yield from islice((row for row in rows if row["selected"]), RESPONSES)


def _shown(
    row: Mapping[str, Any],
    point: Point,
    number: int,
    selector: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    count = len(row["response_ids"])
    marks = [_NONE] * count
    quantities: list[float | None] = [None] * count
    for position, quantity in zip(row["selected"], row["quantity"], strict=True):
        marks[position], quantities[position] = _SELECTED, quantity
    for position in row["changed"]:
        marks[position] = _CHANGED
    return {
        "run": selector,
        "step": number,
        "prompt": row["prompt"],
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "data_source": f"{row['data_source']} · {point.name}",
        "response": "",
        "response_tokens": count,
        "accuracy": row["accuracy"],
        "finish_reason": row["finish_reason"],
        "versions": [],
        "tokens": {
            "text": [str(tokenizer.decode([token])) for token in row["response_ids"][:TOKENS]],
            "mark": marks[:TOKENS],
            "swapped": [_MEANINGS[mark] for mark in marks[:TOKENS]],
            "quantity": quantities[:TOKENS],
        },
        "cut": count > TOKENS,
    }
