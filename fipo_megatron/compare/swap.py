"""``fipo compare swap CONFIG compare.base=DIR compare.rl=DIR|CHECKPOINT [key=value ...]``

Answers the problems in evaluation.files with one model, and lets the other one draw the tokens at selected positions:
curves of accuracy over the share of swapped tokens, by direction and selector (compare.direction, compare.select,
compare.share or compare.threshold, compare.seeds). Both models run in this process, or on SGLang servers.

Results: run.output/swap-NAME/ with swap.json, responses-*.jsonl, points/ and report.html. Start it again to go on after
an interruption, or with more shares, seeds apart; finished points are kept. Exit code 0: done; 1: it failed; 2: the
configuration, or an input that it names, is invalid.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fipo_megatron.compare import swap_curves, swap_page
from fipo_megatron.compare.swap_inputs import SwapInputs, read_swap_inputs
from fipo_megatron.compare.swap_points import Point, PointFiles, Role, curves_of, points_of
from fipo_megatron.compare.swap_sampling import sample_points
from fipo_megatron.config import Config
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.evaluation.exit_codes import run_program
from fipo_megatron.storage.atomic import write_atomic
from fipo_megatron.storage.output_lock import lock_output

logger = logging.getLogger("fipo_megatron")
SWAP, SETTINGS, PAGE = "swap.json", "settings.json", "report.html"


def main(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return run_program(__doc__, arguments, read_swap_inputs, run, lambda _: "start it again to go on")


def run(config: Config, inputs: SwapInputs) -> None:
    """Samples all points, writes the results and prints the table.

    Raises:
        InputError: The directory holds a comparison with other settings.
        WeightsError: A model is damaged.
        OSError: The results cannot be written, or another process writes them.
    """
    with lock_output(inputs.output):
        settings = _settings(config, inputs)
        _check_settings(inputs.output, settings)
        files, plan = PointFiles(inputs.output), plan_of(config, inputs)
        if any(files.read(point) is None for point in plan):
            with _directories(inputs) as models:
                asyncio.run(sample_points(config, inputs.answering, models, plan, files))
        result = settings | swap_curves.summarise(config.compare, inputs.seeds, files)
        page = swap_page.render(result, config.compare, files, inputs.answering.tokenizer)
        write_atomic(inputs.output / PAGE, page)
        write_atomic(inputs.output / SWAP, json.dumps(result, indent=1) + "\n")
    print(f"\n{swap_curves.text_table(result)}\n\n{inputs.output}/{SWAP}, {PAGE}, responses-*.jsonl")


def plan_of(config: Config, inputs: SwapInputs) -> list[Point]:
    """Returns all points: those of the models alone come first."""
    roles: tuple[Role, ...] = ("base", "rl")
    alone = [Point(role, seed) for role in roles for seed in inputs.seeds]
    curves = list(curves_of(config.compare))
    return alone + [
        point for seed in inputs.seeds for curve in curves for point in points_of(config.compare, curve, seed)
    ]


@contextmanager
def _directories(inputs: SwapInputs) -> Iterator[dict[Role, Path]]:
    """Yields the Hugging Face directories of the models. A converted checkpoint is removed at the end of the block."""
    if not inputs.rl.is_checkpoint:
        yield {"base": inputs.base.path, "rl": inputs.rl.path}
        return
    from fipo_megatron.actor.hf_conversion import temporary_hf

    with temporary_hf(inputs.rl.path, inputs.output / "hf.temporary", inputs.rl.companions) as directory:
        yield {"base": inputs.base.path, "rl": directory}


def _settings(config: Config, inputs: SwapInputs) -> dict[str, Any]:
    """Returns what all points of a directory have in common."""
    problems = hashlib.sha256()
    for prompt in inputs.answering.problems:
        problems.update(
            f"{prompt.id}\0{prompt.tokens.tolist()}\0{prompt.ground_truth}\0{prompt.data_source}\n".encode()
        )
    return {
        "base": str(inputs.base.path.resolve()),
        "rl": str(inputs.rl.path.resolve()),
        "engine": config.rollout.engine,
        "problems": problems.hexdigest(),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "temperature": config.evaluation.temperature,
        "top_p": config.evaluation.top_p,
        "max_response_tokens": config.rollout.max_response_tokens,
        "verifier": config.reward.verifier,
        "truncated_is_wrong": config.reward.truncated_is_wrong,
        "seeds": list(inputs.seeds),
    }


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or compares them with those of the finished points.

    Raises:
        InputError: They differ.
    """
    file = output / SETTINGS
    if not file.is_file():
        write_atomic(file, json.dumps(settings, indent=1) + "\n")
        return
    before = {"engine": "embedded"} | json.loads(file.read_text(encoding="utf-8"))  # earlier versions do not name it
    if names := [name for name, value in settings.items() if before.get(name) != value]:
        raise InputError(
            f"{output}: holds points with another {', '.join(names)}; choose another name with compare.name, or remove "
            "the directory"
        )
