"""The page of a comparison: histograms, the profile over a response, and responses coloured by every quantity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fipo_megatron.compare.shift_summary import TokenTable, rows
from fipo_megatron.report import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = Path(__file__).parent / "page"
RESPONSES, TOKENS = 40, 4000
"""Responses on the page, and tokens of each."""
_LABELS = {
    "js": "JS divergence (nats)",
    "kl": "KL(RL ‖ base) (nats)",
    "kl_reverse": "KL(base ‖ RL) (nats)",
    "delta": "Δ log p of the token (nats)",
    "entropy_base": "entropy of base (nats)",
    "entropy_rl": "entropy of RL (nats)",
    "rank": "rank of RL's first choice in base",
    "overlap": "overlap of the most likely tokens",
}
_CENTRES = {"delta": 0.0, "rank": 1.0, "overlap": 1.0}
_ROWS = ("log_prob_base", "log_prob_rl", "choice_base", "choice_rl")
_DECADES = range(-10, 3)
_DELTA_EDGES = np.linspace(-8.0, 8.0, 65)


def render(
    summary: Mapping[str, Any],
    table: TokenTable,
    tokens: Path,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Returns the HTML of the page.

    Args:
        summary: Settings and summary of the comparison.
        table: Numbers of all positions.
        tokens: ``tokens.jsonl``.
        prompts: Text of the prompt of each response.
        tokenizer: Tokenizer of the models.
    """
    count = len(prompts)
    step = max(1, -(-count // RESPONSES))
    shown = [_shown(row, prompts[row["response"]], tokenizer) for row in _every(tokens, step)]
    data = {
        "runs": [{"name": "comparison"}],
        "row_name": "response",
        "token_modes": [{"key": k, "label": v, "centre": _CENTRES.get(k)} for k, v in _LABELS.items()],
        "token_rows": [[name, _LABELS.get(name, name.replace("_", " "))] for name in (*_ROWS, *_LABELS)],
        "responses": shown,
        "omitted": [f"{len(shown)} of {count} responses are shown, selected evenly, up to {TOKENS} tokens of each."],
        "summary": {k: v for k, v in summary.items() if k != "quantities"},
        "quantities": {k: v for k, v in summary["quantities"].items() if k != "abs_delta"},
        "labels": _LABELS,
        "histograms": {name: histogram(name, table.columns[name]) for name in _LABELS},
    }
    scripts = [frame.PARTS / "tokens.js", PARTS / "small_charts.js", PARTS / "shift.js"]
    return frame.assemble("What RL changed", PARTS / "shift.html", scripts, data)


def histogram(name: str, values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Returns labels and counts of the bins: half decades for quantities from 0 on, even bins for the others."""
    if name == "delta":
        edges = np.concatenate([[-math.inf], _DELTA_EDGES, [math.inf]])
        labels = [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
        ticks = {str(v): int(np.searchsorted(edges, v)) for v in (-8, -4, 0, 4)}
    elif name == "overlap":
        edges = np.arange(-0.05, 1.1, 0.1)
        labels = [f"{center:.1f}" for center in edges[:-1] + 0.05]
        ticks = {"0": 0, "0.5": 5, "1": 10}
    elif name == "rank":
        edges = np.concatenate([2.0 ** np.arange(0, 18), [math.inf]])
        labels = [f"{int(a)}" if b == a + 1 else f"{a:g} to {b - 1:g}" for a, b in pairwise(edges)]
        ticks = {"1": 0, "16": 4, "256": 8, "65536": 16}
    else:
        halves = [10 ** (d / 2) for d in range(2 * _DECADES.start, 2 * _DECADES.stop)]
        edges = np.array([-math.inf, *halves, math.inf])
        labels = [f"{max(a, 0.0):.1e} to {b:.1e}" for a, b in pairwise(edges)]
        ticks = {f"1e{d}": 2 * (d - _DECADES.start) + 1 for d in (-10, -8, -6, -4, -2, 0, 2)}
    counts, _ = np.histogram(values, edges)
    return {"labels": labels, "counts": counts.tolist(), "ticks": ticks}


def _every(file: Path, step: int) -> Iterator[dict[str, Any]]:
    return islice(iter(rows(file)), 0, None, step)


def _shown(row: dict[str, Any], prompt: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    numbers = {name: [float(f"{v:.4g}") for v in row[name][:TOKENS]] for name in (*_LABELS, *_ROWS[:2])}
    choices = {name: [str(tokenizer.decode([i])) for i in row[name][:TOKENS]] for name in _ROWS[2:]}
    return {
        "run": 0,
        "step": row["response"],
        "prompt": prompt,
        "response": "",
        "response_tokens": len(row["text"]),
        "accuracy": row["accuracy"],
        "versions": [],
        "tokens": {"text": row["text"][:TOKENS]} | numbers | choices,
        "cut": len(row["text"]) > TOKENS,
    } | {name: row[name] for name in ("prompt_id", "sample", "data_source", "finish_reason")}
