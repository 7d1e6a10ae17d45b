"""Evaluates a model: avg@k, cons@k and pass@k of every data set, with intervals.

python -m fipo_megatron.evaluate CONFIG.yaml [key=value ...]

The model is the Hugging Face directory model.path; with evaluation.checkpoint=DIR a Megatron checkpoint; with
rollout.servers.urls=[...] the model that these SGLang servers serve. Results: run.output/evaluation-NAME/.
With amplify.base=DIR, extrapolates beyond this model, away from a base model (docs/what_rl_changed.md). Results:
run.output/amplify-NAME/; start it again to go on after an interruption.
Exit code 0: the evaluation is complete; 1: it failed; 2: the configuration, or an input that it names, is invalid.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fipo_megatron.config import Config
from fipo_megatron.evaluation import evaluation_summary as summary
from fipo_megatron.evaluation.amplification import amplify, check_settings
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from fipo_megatron.evaluation.exit_codes import run_program
from fipo_megatron.evaluation.standalone import sample_and_count
from fipo_megatron.storage.output_lock import lock_output

logger = logging.getLogger("fipo_megatron")
_Result = TypeVar("_Result")


@contextmanager
def model_directory(config: Config, inputs: EvaluationInputs) -> Iterator[Path]:
    """Yields the model as a Hugging Face directory. A converted checkpoint is removed at the end of the block.

    Raises:
        WeightsError: The checkpoint is damaged or does not fit; see :func:`.actor.hf_conversion.megatron_to_hf`.
        OSError: The converted model cannot be written.
    """
    if config.evaluation.checkpoint is None:
        yield inputs.companions
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Megatron-Core on import
        from fipo_megatron.actor.hf_conversion import temporary_hf
    checkpoint = Path(config.evaluation.checkpoint)
    with temporary_hf(checkpoint, inputs.output / "hf.temporary", inputs.companions) as directory:
        yield directory


async def cancel_on_sigterm(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Awaits the result. SIGTERM cancels the work, as Ctrl-C does, so that it ends the processes it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def settings(config: Config) -> dict[str, Any]:
    """Returns the model and the sampling settings, for the summary."""
    served = config.rollout.engine == "sglang" and config.rollout.servers.urls
    return {
        "model": config.model.path,
        "checkpoint": config.evaluation.checkpoint,
        "servers": list(config.rollout.servers.urls) if served else [],
        "files": list(config.evaluation.files),
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "temperature": config.evaluation.temperature,
        "top_p": config.evaluation.top_p,
        "max_response_tokens": config.rollout.max_response_tokens,
        "verifier": config.reward.verifier,
        "truncated_is_wrong": config.reward.truncated_is_wrong,
        "engine": config.rollout.engine,
        "seed": config.seed,
    }


def _evaluate(config: Config, inputs: EvaluationInputs) -> str:
    """Evaluates the model, writes the results and returns them as text."""
    with model_directory(config, inputs) as directory:
        evaluation = asyncio.run(cancel_on_sigterm(sample_and_count(config, inputs, directory)))
    summary.write(inputs.output, evaluation, settings(config))
    return f"{summary.table(evaluation)}\n\n{inputs.output}/{summary.SUMMARY}, {summary.PROBLEMS}"


def _amplify(config: Config, inputs: EvaluationInputs) -> str:
    """Amplifies the model, writes the results and returns them as text.

    Raises:
        InputError: The directory holds runs with other settings.
    """
    shared = check_settings(config, inputs, settings(config))
    with model_directory(config, inputs) as directory:
        return asyncio.run(cancel_on_sigterm(amplify(config, inputs, directory, shared)))


def run(config: Config, inputs: EvaluationInputs) -> None:
    """Evaluates the model, with ``amplify.base`` several times, and prints the result.

    Raises:
        InputError: The directory holds runs with other settings.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM removes temporary files, too
    with lock_output(inputs.output):
        text = _amplify(config, inputs) if config.amplify.base else _evaluate(config, inputs)
    print(f"\n{text}")


def main(arguments: Sequence[str]) -> int:
    """Runs the program and returns its exit code."""

    def kept(config: Config) -> str:
        return "finished runs are kept" if config.amplify.base else "there is no result"

    return run_program(__doc__, arguments, read_evaluation_inputs, run, kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
