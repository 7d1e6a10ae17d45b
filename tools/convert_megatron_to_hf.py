"""Turns a Megatron torch_dist checkpoint into a complete Hugging Face model for transformers, SGLang and others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fipo_megatron import convert as conversion
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.architecture import Architecture

_NOTES = """The result has config.json, tokenizer, generation configuration, safetensors and their index. The
checkpoint may come from convert_hf_to_megatron or from training, under any layout.

  python -m tools.convert_megatron_to_hf CHECKPOINT OUT --dtype bfloat16 --verify
  torchrun --nproc-per-node 8 -m tools.convert_megatron_to_hf CHECKPOINT OUT --tensor-parallel 8

"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_megatron_to_hf",
        description=__doc__,
        epilog=_NOTES + conversion.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="directory with .metadata and .distcp files")
    parser.add_argument("out", type=Path, nargs="?", help="directory to write; must not exist")
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="take config.json, tokenizer and so on from here, not from CHECKPOINT"
    )
    conversion.add_arguments(parser, ("float32", "bfloat16", "float16"))
    given = parser.parse_args(arguments)
    if given.out is None and not given.meta:
        parser.error("OUT is needed without --meta")
    return conversion.exit_code(lambda: _check(given) if given.meta else _convert(given))


def _check(given: argparse.Namespace) -> None:
    companions = torch_dist.companions_of(given.checkpoint, given.hf)
    architecture = Architecture.from_directory(companions)
    held = str(torch_dist.check(given.checkpoint, architecture, companions)).removeprefix("torch.")
    conversion.report_shares(architecture, conversion.parallel_config(given, architecture.layers), given.dtype or held)


def _convert(given: argparse.Namespace) -> None:
    from fipo_megatron.actor.hf_conversion import Options, megatron_to_hf

    architecture = Architecture.from_directory(torch_dist.companions_of(given.checkpoint, given.hf))
    options = Options(
        conversion.parallel_config(given, architecture.layers), given.dtype, given.verify, conversion.progress_bar
    )
    megatron_to_hf(given.checkpoint, given.out, options, given.hf)
    conversion.say_written(given.out)


if __name__ == "__main__":
    sys.exit(main())
