"""``fipo compare shift CONFIG compare.base=DIR compare.rl=DIR|CHECKPOINT [key=value ...]``

Compares two models at every position of responses, exactly over the whole vocabulary: JS and KL divergence, entropies,
the difference of the token's log-prob, the rank of RL's first choice in the base model and the overlap of the most
likely tokens. The responses are those in compare.responses, or answers to evaluation.files. On several ranks:
torchrun --nproc-per-node N -m fipo_megatron.cli compare shift CONFIG …

Results: run.output/compare-NAME/ with responses.jsonl, tokens.jsonl, summary.json and report.html. Start it again to go
on after an interruption. Exit code 0: done; 1: it failed; 2: the configuration, or an input that it names, is invalid.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.compare import shift_page, shift_summary
from fipo_megatron.compare.divergences import QUANTITIES
from fipo_megatron.compare.response_file import NAME, as_given, response_lines
from fipo_megatron.compare.shift_inputs import PAGE, SETTINGS, SUMMARY, TOKENS, ShiftInputs, read_shift_inputs
from fipo_megatron.config import Config
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.evaluation.answering import Response
from fipo_megatron.evaluation.exit_codes import run_program
from fipo_megatron.evaluation.standalone import sample_and_count
from fipo_megatron.storage.atomic import write_atomic
from fipo_megatron.storage.output_lock import OutputInUseError, lock_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fipo_megatron.actor.parallel import RankLayout

logger = logging.getLogger("fipo_megatron")
_PROGRESS_SECONDS = 10.0
_DIGITS = 10
"""Significant digits of numbers in tokens.jsonl."""
_WHOLE = ("rank", "choice_base", "choice_rl")


def main(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""
    return run_program(__doc__, arguments, read_shift_inputs, run, lambda _: "start it again to go on")


def run(config: Config, inputs: ShiftInputs) -> None:
    """Compares the models. A collective of all ranks.

    Raises:
        InputError: The directory holds a comparison with other settings.
        WeightsError: A model is damaged.
        OSError: The results cannot be written, or another process writes them.
    """
    with ExitStack() as resources:
        locked = inputs.responses is None
        if locked:
            resources.enter_context(lock_output(inputs.output))
            inputs = _sampled(config, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of Megatron-Core on import
            from fipo_megatron.actor import parallel
            from fipo_megatron.actor.collectives import broadcast_from_first_rank

            layout = parallel.initialize(config.actor.parallel, config.seed)
        resources.callback(parallel.destroy)
        problem: Exception | None = None
        done = 0
        if layout.rank == 0:
            try:
                if not locked:
                    resources.enter_context(lock_output(inputs.output))
                done = _prepare(config, inputs)
            except (InputError, OutputInUseError, OSError) as error:
                problem = error
        problem, done = broadcast_from_first_rank((problem, done), layout.device)
        if problem is not None:
            raise problem
        _compare(config, inputs, layout, done)
        if layout.rank == 0:
            finish(config, inputs)


def _sampled(config: Config, inputs: ShiftInputs) -> ShiftInputs:
    """Samples the responses and writes ``responses.jsonl``; returns the inputs with them."""
    assert inputs.sampling is not None
    sampling, evaluation_inputs = inputs.sampling
    kept: dict[tuple[int, int], Trajectory] = {}
    order = {prompt.id: number for number, prompt in enumerate(evaluation_inputs.problems)}

    def keep(response: Response) -> None:
        assert response.trajectory is not None
        accuracy = None if response.failure else int(response.right)
        one = response.trajectory
        kept[order[one.prompt.id], one.sample] = as_given(replace(one, accuracy=accuracy))

    directory: Any = nullcontext(evaluation_inputs.companions)
    if sampling.evaluation.checkpoint is not None:
        from fipo_megatron.actor.hf_conversion import temporary_hf

        checkpoint = Path(sampling.evaluation.checkpoint)
        directory = temporary_hf(checkpoint, inputs.output / "hf.temporary", evaluation_inputs.companions)
    with directory as path:
        asyncio.run(sample_and_count(sampling, evaluation_inputs, path, keep))
    write_atomic(inputs.output / NAME, response_lines((kept[key] for key in sorted(kept)), inputs.base.tokenizer))
    return read_shift_inputs(config)


def _prepare(config: Config, inputs: ShiftInputs) -> int:
    """Writes the responses and the settings, or checks those of the interrupted comparison.

    Returns:
        The number of responses that are done.

    Raises:
        InputError: The directory holds a comparison with other settings.
    """
    assert inputs.responses is not None
    text = response_lines(inputs.responses.trajectories, inputs.base.tokenizer)
    settings = {
        "base": str(inputs.base.path.resolve()),
        "rl": str(inputs.rl.path.resolve()),
        "temperature": config.compare.temperature,
        "top_k": config.compare.top_k,
        "dtype": config.actor.dtype,
        "responses": hashlib.sha256(text.encode()).hexdigest(),
    }
    file = inputs.output / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if names := [name for name, value in settings.items() if before.get(name) != value]:
            raise InputError(
                f"{inputs.output}: holds an interrupted comparison with another {', '.join(names)}; choose another "
                "name with compare.name, or remove the directory"
            )
    else:
        write_atomic(inputs.output / NAME, text)
        write_atomic(file, json.dumps(settings, indent=1) + "\n")
    return _whole_rows(inputs.output / TOKENS)


def _whole_rows(file: Path) -> int:
    """Removes an unfinished last row; returns the number of rows."""
    if not file.is_file():
        return 0
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(file, whole)
    return whole.count(b"\n")


def _compare(config: Config, inputs: ShiftInputs, layout: RankLayout, done: int) -> None:
    """Writes the rows of all responses that are not done."""
    from fipo_megatron.compare.teacher_forcing import ModelPair, Source

    assert inputs.responses is not None
    trajectories = inputs.responses.trajectories
    if done >= len(trajectories):
        return
    if done:
        logger.info("%d of %d responses are done; going on", done, len(trajectories))
    base, rl = (Source(model.path, model.architecture) for model in (inputs.base, inputs.rl))
    pair = ModelPair(base, rl, config, layout)
    begin = last = time.monotonic()
    tokens = 0
    for members in pair.rounds([len(one) for one in trajectories], done):
        found = pair.compare(trajectories, members)
        tokens += sum(values.shape[1] for values in found.values())
        if layout.rank:
            continue
        rows = [row_of(trajectories[i], i, found[i], inputs.base.tokenizer) for i in members]
        with (inputs.output / TOKENS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS or members.stop == len(trajectories):
            last = now
            rate = tokens / max(now - begin, 1e-3)
            logger.info("%d of %d responses, %.0f positions/s", members.stop, len(trajectories), rate)


def row_of(
    trajectory: Trajectory, number: int, values_KT: NDArray[np.float64], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Returns the row of a response in ``tokens.jsonl``: parallel lists of its tokens and their numbers.

    Args:
        trajectory: The response.
        number: Number of the response.
        values_KT: :data:`.divergences.QUANTITIES` of its tokens.
        tokenizer: Tokenizer of the models.
    """
    prompt = trajectory.prompt
    row: dict[str, Any] = {
        "response": number,
        "prompt_id": prompt.id,
        "sample": trajectory.sample,
        "data_source": prompt.data_source,
        "accuracy": trajectory.accuracy,
        "finish_reason": trajectory.finish_reason,
        "token_ids": trajectory.tokens.tolist(),
        "text": [str(tokenizer.decode([token])) for token in trajectory.tokens.tolist()],
    }
    for name, values in zip(QUANTITIES, values_KT.tolist(), strict=True):
        row[name] = [int(v) for v in values] if name in _WHOLE else [float(f"{v:.{_DIGITS}g}") for v in values]
    return row


def finish(config: Config, inputs: ShiftInputs) -> None:
    """Writes the page and the summary, and prints the most important numbers."""
    assert inputs.responses is not None
    table = shift_summary.TokenTable.read(inputs.output / TOKENS)
    settings = json.loads((inputs.output / SETTINGS).read_text(encoding="utf-8"))
    summary = settings | {"inexact_rows_left_out": inputs.responses.inexact, "seed": config.seed}
    summary |= shift_summary.summarise(table, inputs.base.tokenizer)
    prompts = [str(inputs.base.tokenizer.decode(one.prompt.tokens.tolist())) for one in inputs.responses.trajectories]
    page = shift_page.render(summary, table, inputs.output / TOKENS, prompts, inputs.base.tokenizer)
    write_atomic(inputs.output / PAGE, page)
    write_atomic(inputs.output / SUMMARY, json.dumps(summary, indent=1) + "\n")
    print(f"\n{shift_summary.text_table(summary)}\n\n{inputs.output}/{SUMMARY}, {TOKENS}, {PAGE}")
