"""Turns a Hugging Face model into a Megatron torch_dist checkpoint that any layout loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fipo_megatron import convert as conversion
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import HfDirectory

_NOTES = """The checkpoint can be loaded under any tensor, pipeline, expert and data parallelism, with Transformer
Engine's layers or without. One rank does, if the weights fit into its memory:

  python -m tools.convert_hf_to_megatron MODEL OUT --verify

and so do many, each with its share (by default all ranks are stages of a pipeline):

  torchrun --nnodes 2 --nproc-per-node 8 ... -m tools.convert_hf_to_megatron MODEL OUT --tensor-parallel 8

"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_hf_to_megatron",
        description=__doc__,
        epilog=_NOTES + conversion.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="directory with config.json, safetensors and tokenizer")
    parser.add_argument("out", type=Path, nargs="?", help="directory to write; must not exist")
    conversion.add_arguments(parser, ("float32", "bfloat16"))
    given = parser.parse_args(arguments)
    if given.out is None and not given.meta:
        parser.error("OUT is needed without --meta")
    return conversion.exit_code(lambda: _check(given) if given.meta else _convert(given))


def _check(given: argparse.Namespace) -> None:
    architecture = Architecture.from_directory(given.model)
    directory = HfDirectory(given.model)
    directory.check(architecture)
    conversion.report_shares(
        architecture, conversion.parallel_config(given, architecture.layers), given.dtype or directory.training_dtype
    )


def _convert(given: argparse.Namespace) -> None:
    from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron

    architecture = Architecture.from_directory(given.model)
    options = Options(
        conversion.parallel_config(given, architecture.layers), given.dtype, given.verify, conversion.progress_bar
    )
    hf_to_megatron(given.model, given.out, options)
    conversion.say_written(given.out)


if __name__ == "__main__":
    sys.exit(main())
