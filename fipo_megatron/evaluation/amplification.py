"""Extrapolation beyond RL at test time: samples every γ and threshold with its control, and writes the results."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fipo_megatron.config import Config
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.trajectory import Prompt
from fipo_megatron.evaluation.amplify_runs import Runs, settings_of
from fipo_megatron.evaluation.amplify_table import Amplification, Amplified
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.evaluation_summary import AMPLIFY
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
_SETTINGS = "settings.json"


def check_settings(config: Config, inputs: EvaluationInputs, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the settings that all runs share, or compares them with those of the interrupted amplification.

    Args:
        config: Configuration of the evaluation.
        inputs: Its inputs.
        settings: Model and sampling settings by name.

    Returns:
        All settings by name.

    Raises:
        InputError: The directory holds runs with other settings.
    """
    shared = {
        **settings,
        "base": config.amplify.base,
        "primary": config.amplify.primary,
        "problems_sha256": _digest(inputs.problems),
    }
    file = inputs.output / _SETTINGS
    if not file.is_file():
        write_atomic(file, json.dumps(shared, indent=2) + "\n")
        return shared
    before = json.loads(file.read_text(encoding="utf-8"))
    if names := [name for name, value in shared.items() if before.get(name) != value]:
        raise InputError(
            f"{inputs.output}: holds an interrupted amplification with another {', '.join(names)}; choose another name "
            "with evaluation.name, or remove the directory"
        )
    return shared


async def amplify(config: Config, inputs: EvaluationInputs, rl: Path, settings: Mapping[str, Any]) -> str:
    """Samples the runs that are not finished, writes ``amplify.json`` and returns the table.

    Args:
        config: Configuration of the evaluation.
        inputs: Its inputs.
        rl: Hugging Face directory of the RL model.
        settings: Settings of the evaluation by name, copied into the results.
    """
    runs = Runs(config, inputs, rl)
    alone = await runs.alone(config.evaluation.temperature)
    grid = settings_of(config)
    amplified = []
    for number, setting in enumerate(grid, start=1):
        logger.info("setting %d of %d: %s", number, len(grid), setting)
        run = await runs.amplified(setting)
        amplified.append(Amplified(setting, run, await runs.control(run.entropy)))
    result = Amplification(alone, amplified)
    write_atomic(inputs.output / AMPLIFY, json.dumps({**settings, **result.as_json()}, indent=2) + "\n")
    return f"{result.table()}\n\n{inputs.output}/{AMPLIFY}, runs/"


def _digest(problems: Sequence[Prompt]) -> str:
    """Returns a digest of the problems in their order."""
    digest = hashlib.sha256()
    for one in problems:
        digest.update(json.dumps([one.id, one.tokens.tolist(), one.ground_truth, one.data_source]).encode())
    return digest.hexdigest()
