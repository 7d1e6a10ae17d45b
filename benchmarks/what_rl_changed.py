"""Compares the two models of a finished quickstart and writes the results that docs/what_rl_changed.md shows.

python -m benchmarks.what_rl_changed --quickstart DIR [--parts shift swap amplify] [--output DIR]
python -m benchmarks.what_rl_changed --tables

Parts: ``shift`` is ``fipo compare shift`` on responses of each of the two models. ``swap`` is ``fipo compare swap``
with all selectors, both directions and three seeds. ``amplify`` trains the quickstart's first five steps again and is
``fipo evaluate`` with ``amplify.base`` on that checkpoint. Without --parts: shift and swap.

Results: benchmarks/results/quickstart_PART.json and docs/images/quickstart_swap.png. The files of the commands are in
--output (default: DIR/compared); what is finished there is not run again. --tables prints the tables of the page from
the committed results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks import what_rl_changed_chart, what_rl_changed_tables
from benchmarks.result_table import RESULTS, write_result
from fipo_megatron.compare.swap_curves import Pooled
from fipo_megatron.compare.swap_points import Point, PointFiles
from fipo_megatron.evaluation.estimates import estimate

CONFIG = "examples/quickstart/fipo.yaml"
CHART = Path(__file__).parents[1] / "docs" / "images" / "quickstart_swap.png"
SHARES, SEEDS = (0.05, 0.1, 0.2, 0.4), (1, 2, 3)
LOCATED = ("base_to_rl", "delta", 0.1)
"""Direction, selector and target share of the point whose swapped positions are counted."""
FIRST_LINES = 6
AMPLIFICATIONS = (("rl", "1e-9,0.05,0.1,0.2,0.5,1.0", "null,-0.3,0"), ("base", "1e-9,0.2,1.0", "-0.3,0"))
"""The model that draws first, values of γ and thresholds."""
_DIGITS, _MOST_TOKENS = 6, 10
_QUANTITIES = ("js", "kl", "kl_reverse", "delta", "entropy_base", "entropy_rl", "rank", "overlap")


def main() -> None:
    """Runs the commands and writes their results, or prints the tables of the committed results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="directory of a finished quickstart")
    parser.add_argument("--output", type=Path, help="directory for the files of the commands (QUICKSTART/compared)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=["shift", "swap"], help="what to run")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the committed results")
    arguments = parser.parse_args()
    if not arguments.tables:
        if arguments.quickstart is None:
            parser.error("--quickstart: missing; expected the directory of a finished quickstart")
        quickstart: Path = arguments.quickstart
        output: Path = arguments.output or quickstart / "compared"
        missing = [file for file in _weights(quickstart).values() if not file.is_file()]
        if missing:
            parser.error(f"--quickstart {quickstart}: has no {missing[0]}; expected a finished quickstart")
        _keep_models(output, quickstart, parser)
        for part in arguments.parts:
            result = _rounded(PARTS[part](quickstart, output))
            write_result(f"quickstart_{part}", result)
            if part == "swap":
                CHART.write_bytes(what_rl_changed_chart.draw(result))
    print(what_rl_changed_tables.page_tables(RESULTS))


def shift(quickstart: Path, output: Path) -> dict[str, Any]:
    """Compares both models on responses of each of them."""
    responses, commands = {}, []
    for sampler in ("rl", "base"):
        name = f"{sampler}-responses"
        settings = [*_models(quickstart, output), f"compare.sampler={sampler}", f"compare.name={name}"]
        commands.append(["fipo", "compare", "shift", CONFIG, *settings])
        summary = output / f"compare-{name}" / "summary.json"
        if not summary.is_file():
            _run(commands[-1])
        responses[sampler] = _compact(json.loads(summary.read_text(encoding="utf-8")))
    return _head(quickstart, commands) | {"responses_of": responses}


def swap(quickstart: Path, output: Path) -> dict[str, Any]:
    """Swaps tokens with all selectors in both directions."""
    lists = [f"compare.{name}=[{','.join(map(str, values))}]" for name, values in (("share", SHARES), ("seeds", SEEDS))]
    settings = [*_models(quickstart, output), "rollout.embedded_slots=256", "compare.name=quickstart", *lists]
    command = ["fipo", "compare", "swap", CONFIG, *settings]
    _run(command)
    found = output / "swap-quickstart"
    result = json.loads((found / "swap.json").read_text(encoding="utf-8"))
    names = ("temperature", "top_p", "samples_per_prompt", "seeds", "alone", "gap", "curves")
    more = {"located": _where_swaps_are(found, quickstart), "best_delta": _best_delta(found, result["curves"])}
    return _head(quickstart, [command]) | {name: result[name] for name in names} | more


def amplify(quickstart: Path, output: Path) -> dict[str, Any]:
    """Extrapolates from the checkpoint of step 5, which it trains first, with either model drawing first."""
    run = output / "first_steps"
    train = ["python", "-m", "examples.quickstart", "--output", str(run), "run.steps=5"]
    if not (run / "fipo" / "hf").is_dir():
        _run(train)
    commands, results = [train], list[dict[str, Any]]()
    for primary, gammas, thresholds in AMPLIFICATIONS:
        evaluate = [
            *("fipo", "evaluate", CONFIG, "seed=1", f"run.output={run}/fipo", f"model.path={run}/sft/hf"),
            *(f"evaluation.checkpoint={run}/fipo/checkpoints/step-000005", f"amplify.base={run}/sft/hf"),
            *(f"evaluation.files=[{run}/data/held_out.jsonl]", "evaluation.samples_per_prompt=4"),
            *("rollout.embedded_slots=256", f"evaluation.name={primary}-first", f"amplify.primary={primary}"),
            *(f"amplify.gamma=[{gammas}]", f"amplify.threshold=[{thresholds}]"),
        ]
        commands.append(evaluate)
        file = run / "fipo" / f"amplify-{primary}-first" / "amplify.json"
        if not file.is_file():
            _run(evaluate)
        results.append(json.loads(file.read_text(encoding="utf-8")))
    return _head(run, commands) | results[0] | {"base_first": results[1]["settings"]}


PARTS: Mapping[str, Callable[[Path, Path], dict[str, Any]]] = {"shift": shift, "swap": swap, "amplify": amplify}


def _models(quickstart: Path, output: Path) -> list[str]:
    models = [f"compare.base={quickstart}/sft/hf", f"compare.rl={quickstart}/fipo/hf"]
    return [*models, f"evaluation.files=[{quickstart}/data/held_out.jsonl]", f"run.output={output}"]


def _run(command: Sequence[str]) -> None:
    """Runs a command of the documentation in this environment; exits with its code if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    words = ["-m", "fipo_megatron.cli", *command[1:]] if command[0] == "fipo" else command[1:]
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        sys.exit(code)


def _weights(quickstart: Path) -> dict[str, Path]:
    stages = {"base": "sft", "rl": "fipo"}
    return {role: quickstart / stage / "hf" / "model.safetensors" for role, stage in stages.items()}


def _digests(quickstart: Path) -> dict[str, str]:
    return {role: hashlib.sha256(file.read_bytes()).hexdigest() for role, file in _weights(quickstart).items()}


def _head(quickstart: Path, commands: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"commands": [shlex.join(command) for command in commands], "models_sha256": _digests(quickstart)}


def _keep_models(output: Path, quickstart: Path, parser: argparse.ArgumentParser) -> None:
    """Records the models whose results are in the directory, or exits if it has those of other ones."""
    file, digests = output / "models_sha256.json", _digests(quickstart)
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != digests:
        parser.error(f"--output {output}: holds the results of other models; remove it or name another directory")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(digests) + "\n", encoding="utf-8")


def _compact(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a ``summary.json`` without percentiles and most of its lists."""
    quantities = {
        name: {key: summary["quantities"][name][key] for key in ("mean", "min", "max", "fractions")}
        | {"profile": summary["quantities"][name]["profile"]["mean"]}
        for name in _QUANTITIES
    }
    tokens = summary["most_changed_tokens"][:_MOST_TOKENS]
    names = ("temperature", "responses", "positions", "concentration")
    return {name: summary[name] for name in names} | {"quantities": quantities, "most_changed_tokens": tokens}


def _where_swaps_are(directory: Path, quickstart: Path) -> dict[str, Any]:
    """Counts the swapped positions of one point: all, those of first tokens, and those at the starts of lines."""
    direction, selector, share = LOCATED
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "sft" / "hf")
    counts = dict.fromkeys(("responses", "swaps", "first_tokens", "line_starts"), 0)
    for row in _rows(directory, f"{direction}-{selector}-share{share:g}"):
        texts = [str(tokenizer.decode([token])) for token in row["response_ids"]]
        starts = [0, *(i + 1 for i, text in enumerate(texts) if text.endswith("\n"))][:FIRST_LINES]
        counts["responses"] += 1
        counts["swaps"] += len(row["selected"])
        counts["first_tokens"] += 0 in row["selected"]
        counts["line_starts"] += len(set(starts) & set(row["selected"]))
    return {"direction": direction, "selector": selector, "share": share, "first_lines": FIRST_LINES} | counts


def _rows(directory: Path, point: str) -> Iterator[dict[str, Any]]:
    for seed in SEEDS:
        with (directory / f"responses-{point}-seed{seed}.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _best_delta(directory: Path, curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compares the most accurate point of delta from base to RL with RL alone, paired by problem."""
    files = PointFiles(directory)
    (curve,) = [curve for curve in curves if (curve["direction"], curve["selector"]) == LOCATED[:2]]
    share = max(curve["points"], key=lambda row: row["accuracy"])["share"]
    swapped, alone = (
        Pooled.of([result for point in points if (result := files.read(point)) is not None])
        for points in ([Point("base", seed, "delta", share) for seed in SEEDS], [Point("rl", seed) for seed in SEEDS])
    )
    difference = swapped.accuracies - alone.accuracies
    [gain] = estimate([difference[np.isfinite(difference)].tolist()])
    return {"share": share, "over_rl": asdict(gain)}


def _rounded(value: Any) -> Any:
    """Returns the value with its floating-point numbers rounded to six significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


if __name__ == "__main__":
    main()
