"""The tables of docs/what_rl_changed.md and its sentences with figures, from the results of the quickstart's models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fipo_megatron.compare.swap_curves import accuracy, reached

Result = Mapping[str, Any]
DIRECTIONS = {"base_to_rl": "base → RL", "rl_to_base": "RL → base"}


def page_tables(results: Path) -> str:
    """Returns all tables and sentences of the page that can be made from the files in the directory."""
    return "\n\n".join(part for parts in (tables(results), sentences(results)) for part in parts)


def tables(results: Path) -> list[str]:
    """Returns the tables of the page, in Markdown, in the order of the page.

    Args:
        results: Directory with ``quickstart_shift.json``, ``quickstart_swap.json`` and ``quickstart_amplify.json``.
    """
    found = []
    for name, makers in {
        "shift": (shift_table,),
        "swap": (swap_table, accuracy_table),
        "amplify": (amplify_table, base_first_table),
    }.items():
        found += [make(result) for result in _read(results, name) for make in makers]
    return found


def sentences(results: Path) -> list[str]:
    """Returns parts of sentences of the page, with their figures."""
    found = []
    for name, make in {"shift": shift_sentences, "swap": swap_sentences, "amplify": amplify_sentences}.items():
        found += [text for result in _read(results, name) for text in make(result)]
    return found


def _read(results: Path, name: str) -> list[Result]:
    file = results / f"quickstart_{name}.json"
    return [json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def shift_table(result: Result) -> str:
    """Returns the table of changed positions: a row for the responses of each model."""
    heads = ["responses of", "positions", "js > 0.01", "js > 0.1", "rank > 1", "delta < −0.5"]
    heads.append("share of JS in 1 % / 5 % / 10 % of the positions")
    rows = []
    for role, name in {"rl": "the RL model", "base": "the base model"}.items():
        found = result["responses_of"][role]
        quantities, js = found["quantities"], found["concentration"]["js"]
        columns = (("js", "> 0.01"), ("js", "> 0.1"), ("rank", "> 1"), ("delta", "< -0.5"))
        fractions = [percent(quantities[key]["fractions"][cut]) for key, cut in columns]
        parts = " / ".join(f"{100 * js[share]:.0f} %" for share in ("0.01", "0.05", "0.1"))
        rows.append([name, f"{found['positions']:,}", *fractions, parts])
    return _markdown(heads, rows)


def shift_sentences(result: Result) -> list[str]:
    """Returns what the page says about the place of the change and about the most changed token."""
    js = result["responses_of"]["rl"]["quantities"]["js"]
    token = result["responses_of"]["base"]["most_changed_tokens"][0]
    return [
        f"the mean JS divergence of the first twentieth of a response is {js['profile'][0]:.2f}, against "
        f"{js['mean']:.2f} over all positions",
        f"the token `{token['text']}` alone has {100 * token['js_share']:.0f} % of the JS divergence, with a mean "
        f"Δ log p of {_signed(token['delta_mean'])}",
    ]


def swap_table(result: Result) -> str:
    """Returns the table of shares at which 90 % of the gap is recovered: a row per selector."""
    heads = ["selector", *(f"{name}, {what}" for name in DIRECTIONS.values() for what in ("selected", "changed"))]
    rows = []
    for selector, curves in _by_selector(result).items():
        rows.append([f"`{selector}`", *(reached(curves[way], what) for way in DIRECTIONS for what in _WHAT)])
    return _markdown(heads, rows)


def accuracy_table(result: Result) -> str:
    """Returns the table of accuracies at the points of each curve, with the share that was selected."""
    rows = []
    for selector, curves in _by_selector(result).items():
        cells = [
            ", ".join(f"{percent(row['accuracy'])} at {percent(row['selected'])}" for row in curves[way]["points"])
            for way in DIRECTIONS
        ]
        rows.append([f"`{selector}`", *cells])
    return _markdown(["selector", *DIRECTIONS.values()], rows)


def swap_sentences(result: Result) -> list[str]:
    """Returns what the page says about the models alone, the best point of delta, and the place of the swaps."""
    base, rl, at = result["alone"]["base"], result["alone"]["rl"], result["located"]
    curve = _by_selector(result)[at["selector"]][at["direction"]]
    point, best = (
        next(row for row in curve["points"] if row["share"] == share)
        for share in (at["share"], result["best_delta"]["share"])
    )
    return [
        f"Base alone has {accuracy(base)} right, RL alone {accuracy(rl)}",
        f"{accuracy(best)} against {percent(rl['accuracy'])}, paired {_points(result['best_delta']['over_rl'])} points",
        f"with Δ at {percent(point['selected'])}, {at['swaps'] / at['responses']:.1f} tokens per response are swapped, "
        f"the first token in {at['first_tokens']:,} of {at['responses']:,} responses, and "
        f"{100 * at['line_starts'] / at['swaps']:.0f} % of all swaps are at the starts of the first "
        f"{_NUMBERS[at['first_lines']]} lines",
    ]


def amplify_table(result: Result) -> str:
    """Returns the table of an amplification: a row per setting, as ``fipo evaluate`` prints it."""
    alone, first = result["rl"], result["settings"][0]["accuracy"]["rl"]
    tokens, entropy = f"{alone['response_tokens']:.1f}", f"{alone['entropy']:.3f}"
    return _amplify_rows([["0", "–", _estimate(first), *[""] * 4, tokens, entropy, "", ""]], result["settings"])


def base_first_table(result: Result) -> str:
    """Returns the table of the settings with which the base model draws first."""
    return _amplify_rows([], result["base_first"])


def amplify_sentences(result: Result) -> list[str]:
    """Returns what the page says about RL alone and about the setting that one half of the problems chose."""
    choice, threshold = result["choice"], _threshold(result["choice"])
    other = choice["reported_on"]["accuracy"]
    amplified, rl = (percent(other[name]["value"]) for name in ("amplified", "rl"))
    value, low, high = (_signed(100 * other["over_control"][name]) for name in ("value", "low", "high"))
    return [
        f"is right in {percent(result['settings'][0]['accuracy']['rl']['value'])} of its answers",
        f"γ = {choice['gamma']:g}, threshold {threshold}. On the other half it has {amplified} against {rl} of RL "
        f"alone, and {value} ({low} to {high}) points more than its control",
    ]


def _amplify_rows(rows: Sequence[Sequence[str]], settings: Sequence[Result]) -> str:
    heads = ["γ", "threshold", "accuracy %", "− RL", "− control", "amplified", "changed", "tokens", "entropy"]
    heads += ["control: T", "its entropy"]
    rows = list(rows)
    for setting in settings:
        found, run, control = setting["accuracy"], setting["amplified"], setting["control"]
        rows.append(
            [
                f"{setting['gamma']:g}",
                _threshold(setting),
                *(_estimate(found["amplified"]), _points(found["over_rl"]), _points(found["over_control"])),
                *(f"{run[name]:.1%}" for name in ("selected_fraction", "changed_fraction")),
                *(f"{run['response_tokens']:.1f}", f"{run['entropy']:.3f}"),
                f"{control['temperature']:g}{'' if control['matched'] else '*'}",
                f"{control['entropy']:.3f}",
            ]
        )
    return _markdown(heads, rows)


_WHAT = ("selected", "changed")
_NUMBERS = {4: "four", 5: "five", 6: "six"}


def _by_selector(result: Result) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for curve in result["curves"]:
        found.setdefault(curve["selector"], {})[curve["direction"]] = curve
    return found


def percent(share: float) -> str:
    """Formats a share with one digit after the point, or two if it is below 0.1 %."""
    return f"{100 * share:.{2 if 0 < share < 1e-3 else 1}f} %"


def _estimate(estimate: Result) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def _threshold(setting: Result) -> str:
    return "none" if setting["threshold"] is None else f"{setting['threshold']:g}".replace("-", "−")


def _points(difference: Result) -> str:
    value, low, high = (_signed(100 * difference[name], plus=True) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _signed(value: float, *, plus: bool = False) -> str:
    return f"{value:{'+' if plus else ''}.1f}".replace("-", "−")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n".join([head, f"{'|---' * len(heads)}|", *body])
