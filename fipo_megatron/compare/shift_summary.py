"""The summary of a comparison: fractions beyond cut-offs, percentiles, profiles, and the tokens that changed most."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Floats = NDArray[np.float64]

CUTOFFS: Mapping[str, tuple[float, ...]] = {
    "js": (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3),
    "kl": (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0),
    "kl_reverse": (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0),
    "abs_delta": (0.01, 0.1, 0.5, 1.0, 2.0),
    "delta": (-2.0, -1.0, -0.5, -0.3, -0.1, 0.1, 0.5, 1.0, 2.0),
    "entropy_base": (0.01, 0.1, 0.5, 1.0, 2.0),
    "entropy_rl": (0.01, 0.1, 0.5, 1.0, 2.0),
    "rank": (1.0, 2.0, 5.0, 10.0, 100.0),
    "overlap": (0.5, 0.8, 1.0),
}
"""Cut-offs of each quantity. ``overlap`` and negative cut-offs count the positions below, the others those above."""

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 90, 95, 99, 99.9)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of positions, the most changed first, for which the share of the whole change is given."""
BINS = 20
"""Bins of the relative position in the response."""
_MOST_TOKENS, _MOST_POSITIONS, _CONTEXT = 30, 30, 12
_COLUMNS = ("js", "kl", "kl_reverse", "delta", "entropy_base", "entropy_rl", "rank", "overlap")


@dataclass(frozen=True)
class TokenTable:
    """The numbers of all positions.

    Attributes:
        columns: Numbers by quantity, ``[T]`` float64.
        token_ids: Tokens, ``[T]`` int64.
        choice_rl: RL's most likely token, ``[T]`` int64.
        starts: First position of each response and the end of the last one, ``[N + 1]``.
        accuracies: The verifier's verdict on each response, or None.
    """

    columns: Mapping[str, Floats]
    token_ids: NDArray[np.int64]
    choice_rl: NDArray[np.int64]
    starts: NDArray[np.int64]
    accuracies: tuple[int | None, ...]

    @classmethod
    def read(cls, file: Path) -> TokenTable:
        """Reads ``tokens.jsonl``."""
        parts: dict[str, list[Floats]] = {name: [] for name in (*_COLUMNS, "token_ids", "choice_rl")}
        accuracies = []
        for row in rows(file):
            for name, found in parts.items():
                found.append(np.array(row[name], np.float64))
            accuracies.append(row["accuracy"])
        starts = np.cumsum([0, *(len(part) for part in parts["js"])])
        whole = {name: np.concatenate(found) for name, found in parts.items()}
        ids = {name: whole.pop(name).astype(np.int64) for name in ("token_ids", "choice_rl")}
        whole["abs_delta"] = np.abs(whole["delta"])
        return cls(whole, ids["token_ids"], ids["choice_rl"], starts, tuple(accuracies))

    @property
    def relative(self) -> Floats:
        """Position of each token in its response, from 0 to below 1."""
        lengths = np.diff(self.starts)
        position = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], lengths)
        found: Floats = position / np.repeat(lengths, lengths)
        return found

    def owner(self, position: int) -> int:
        """Returns the number of the response that has a position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1


def rows(file: Path) -> Iterable[dict[str, Any]]:
    """Yields the rows of ``tokens.jsonl``."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def summarise(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns ``summary.json`` without the settings."""
    return {
        "responses": len(table.accuracies),
        "positions": int(table.starts[-1]),
        "quantities": {name: _statistics(name, table.columns[name], table.relative) for name in CUTOFFS},
        "concentration": {name: _concentration(table.columns[name]) for name in ("js", "kl", "abs_delta")},
        "most_changed_tokens": _most_changed_tokens(table, tokenizer),
        "most_changed_positions": _most_changed_positions(table, tokenizer),
    }


def _statistics(name: str, values: Floats, relative: Floats) -> dict[str, Any]:
    """Returns mean, extremes, percentiles, fractions and the profile of a quantity."""
    bins = np.minimum((relative * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    means = np.bincount(bins, values, BINS) / np.maximum(counts, 1)
    upper = [float(np.quantile(values[bins == b], 0.95)) if counts[b] else None for b in range(BINS)]
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentiles": {
            f"{p:g}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
        },
        "fractions": dict(_fraction(name, cutoff, values) for cutoff in CUTOFFS[name]),
        "profile": {
            "positions": counts.tolist(),
            "mean": [float(m) if c else None for m, c in zip(means, counts, strict=True)],
            "percentile_95": upper,
        },
    }


def _fraction(name: str, cutoff: float, values: Floats) -> tuple[str, float]:
    below = cutoff < 0 or name == "overlap"
    return f"{'<' if below else '>'} {cutoff:g}", float((values < cutoff if below else values > cutoff).mean())


def _concentration(values: Floats) -> dict[str, float | None]:
    """Returns the share of the sum that the positions with the largest values have, by share of positions."""
    falling = np.sort(values)[::-1]
    total = falling.sum()
    count = len(falling)
    return {f"{share:g}": float(falling[: round(share * count)].sum() / total) if total else None for share in SHARES}


def _most_changed_tokens(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Returns the tokens with the largest share of the sum of the JS divergence."""
    js, delta, total = table.columns["js"], table.columns["delta"], table.columns["js"].sum()
    tokens, inverse, counts = np.unique(table.token_ids, return_inverse=True, return_counts=True)
    sums, deltas = (np.bincount(inverse, values, len(tokens)) for values in (js, delta))
    order = np.argsort(-sums, kind="stable")[:_MOST_TOKENS]
    return [
        {
            "token_id": int(tokens[i]),
            "text": str(tokenizer.decode([int(tokens[i])])),
            "count": int(counts[i]),
            "js_share": float(sums[i] / total) if total else None,
            "js_mean": float(sums[i] / counts[i]),
            "delta_mean": float(deltas[i] / counts[i]),
        }
        for i in order
    ]


def _most_changed_positions(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Returns the positions with the largest JS divergence, with the text around them."""
    found = []
    for position in np.argsort(-table.columns["js"], kind="stable")[:_MOST_POSITIONS].tolist():
        number = table.owner(position)
        start, end = int(table.starts[number]), int(table.starts[number + 1])
        before = table.token_ids[max(start, position - _CONTEXT) : position].tolist()
        after = table.token_ids[position + 1 : min(end, position + 1 + _CONTEXT)].tolist()
        found.append(
            {
                "response": number,
                "token": position - start,
                "before": str(tokenizer.decode(before)),
                "text": str(tokenizer.decode([int(table.token_ids[position])])),
                "after": str(tokenizer.decode(after)),
                "rl_prefers": str(tokenizer.decode([int(table.choice_rl[position])])),
            }
            | {name: float(table.columns[name][position]) for name in ("js", "kl", "delta", "rank")}
        )
    return found


def text_table(summary: Mapping[str, Any]) -> str:
    """Formats the most important numbers for the terminal."""
    lines = [f"{summary['positions']:,} positions of {summary['responses']:,} responses"]
    for name in ("js", "kl", "kl_reverse", "abs_delta", "rank"):
        found = summary["quantities"][name]
        fractions = ", ".join(f"{cut}: {100 * share:.2f} %" for cut, share in found["fractions"].items())
        lines.append(f"  {name:<11} mean {found['mean']:.4g}, median {found['percentiles']['50']:.4g}; {fractions}")
    for name, found in summary["concentration"].items():
        shares = ", ".join(
            f"{100 * float(share):g} %: {'–' if part is None else f'{100 * part:.1f} %'}"
            for share, part in found.items()
        )
        lines.append(f"  share of the sum of {name} in the most changed positions: {shares}")
    return "\n".join(lines)
