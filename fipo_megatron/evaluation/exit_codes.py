"""Runs a program that evaluates or compares models: arguments, logging, exit codes."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import transformers

from fipo_megatron.config import Config, load_config
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.data.tokenizer import InputError
from fipo_megatron.rollout.engine import EngineError, RequestError
from fipo_megatron.weights.hf_directory import WeightsError

T = TypeVar("T")
logger = logging.getLogger("fipo_megatron")
EXPECTED = (EngineError, RequestError, VerifierError, WeightsError, OSError)
"""Expected failures: logged without a traceback, exit code 1."""


def run_program(
    usage: str | None,
    arguments: Sequence[str],
    read: Callable[[Config], T],
    run: Callable[[Config, T], None],
    interrupted: Callable[[Config], str],
) -> int:
    """Runs a program and returns its exit code: 0 complete, 1 failed, 2 invalid configuration or input.

    Args:
        usage: Text for ``--help``.
        arguments: Configuration file and overrides.
        read: Reads and checks the inputs; raises ValueError.
        run: Does the work.
        interrupted: Returns what an interruption leaves, for the log.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage)
        return 0 if arguments else 2
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for name in ("megatron", "nvidia", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no hints here
    try:
        config = load_config(arguments[0], arguments[1:])
        inputs = read(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        run(config, inputs)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except EXPECTED as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        logger.error("interrupted; %s", interrupted(config))
        return 1
    return 0
