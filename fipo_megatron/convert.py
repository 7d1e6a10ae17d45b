"""Converts models between Hugging Face directories and Megatron torch_dist checkpoints.

python -m fipo_megatron.convert hf-to-megatron MODEL OUT
python -m fipo_megatron.convert megatron-to-hf CHECKPOINT OUT
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from fipo_megatron.actor import launch
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights import tables, torch_dist
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import HfDirectory, VerificationError, WeightsError
from fipo_megatron.weights.sharding import local_parameter_counts

DONE, REFUSED, USAGE, NOT_WRITTEN, DIFFERS = 0, 1, 2, 3, 4
_EXIT_CODES = """exit codes:
  0  done
  1  the files or the layout are invalid: nothing was written
  2  wrong arguments
  3  the result could not be written, for example because the disk is full: nothing is left under its name
  4  --verify found differences: nothing is left under the result's name
"""
_HF_TO_MEGATRON = "Converts a Hugging Face model to a Megatron torch_dist checkpoint that any layout loads."
_HF_TO_MEGATRON_NOTES = """The checkpoint can be loaded under any tensor, pipeline, expert and data parallelism,
with Transformer Engine's layers or without. One rank suffices if the weights fit into its memory:

  python -m fipo_megatron.convert hf-to-megatron MODEL OUT --verify

Several ranks each hold a part (by default all ranks are pipeline stages):

  torchrun --nnodes 2 --nproc-per-node 8 ... -m fipo_megatron.convert hf-to-megatron MODEL OUT --tensor-parallel 8

"""
_MEGATRON_TO_HF = (
    "Converts a Megatron torch_dist checkpoint to a Hugging Face model for transformers, SGLang and others."
)
_MEGATRON_TO_HF_NOTES = """The result is complete: config.json, tokenizer, generation configuration, safetensors and
their index. The checkpoint may come from hf-to-megatron or from training, under any layout.

  python -m fipo_megatron.convert megatron-to-hf CHECKPOINT OUT --dtype bfloat16 --verify
  torchrun --nproc-per-node 8 -m fipo_megatron.convert megatron-to-hf CHECKPOINT OUT --tensor-parallel 8

"""
_NOT_INTERACTIVE_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the converter and returns its exit code.

    Args:
        argv: Command line without the program's name; None: ``sys.argv``.
    """
    arguments = _parse(argv)
    return _run(lambda: (arguments.check if arguments.meta else arguments.convert)(arguments))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fipo_megatron.convert",
        description="Converts models between Hugging Face directories and Megatron torch_dist checkpoints.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)
    to_megatron = _direction(directions, "hf-to-megatron", _HF_TO_MEGATRON, _HF_TO_MEGATRON_NOTES)
    to_megatron.add_argument("model", type=Path, help="directory with config.json, safetensors and tokenizer")
    _add_arguments(to_megatron, ("float32", "bfloat16"))
    to_megatron.set_defaults(check=_check_hf, convert=_hf_to_megatron, parser=to_megatron)
    to_hf = _direction(directions, "megatron-to-hf", _MEGATRON_TO_HF, _MEGATRON_TO_HF_NOTES)
    to_hf.add_argument("checkpoint", type=Path, help="directory with .metadata and .distcp files")
    _add_arguments(to_hf, ("float32", "bfloat16", "float16"))
    to_hf.add_argument(
        "--hf", type=Path, metavar="DIR", help="take config.json, tokenizer and so on from here, not from CHECKPOINT"
    )
    to_hf.set_defaults(check=_check_checkpoint, convert=_megatron_to_hf, parser=to_hf)
    arguments = parser.parse_args(argv)
    if arguments.out is None and not arguments.meta:
        arguments.parser.error("OUT is needed without --meta")
    return arguments


def _direction(
    directions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, description: str, notes: str
) -> argparse.ArgumentParser:
    return directions.add_parser(
        name,
        help=description,
        description=description,
        epilog=notes + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    """Adds the arguments that both directions take."""
    parser.add_argument("out", type=Path, nargs="?", help="directory to write; must not exist")
    for name, what in (
        ("tensor", "ranks that share every matrix"),
        ("pipeline", "stages that share the layers"),
        ("expert", "ranks that share the experts of a mixture"),
    ):
        parser.add_argument(
            f"--{name}-parallel", type=_positive, metavar="N", help=f"{what} while converting (default: see below)"
        )
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the result (default: holds the source exactly)")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it, bit for bit")
    parser.add_argument(
        "--meta", action="store_true", help="check names and shapes only; reads no weights, writes nothing"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _check_hf(arguments: argparse.Namespace) -> None:
    architecture = Architecture.from_directory(arguments.model)
    directory = HfDirectory(arguments.model)
    directory.check(architecture)
    _print_sharding(
        architecture,
        parallel_config(arguments, architecture.layers),
        arguments.dtype or directory.training_dtype,
    )


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    from fipo_megatron.actor.hf_conversion import Options, hf_to_megatron

    architecture = Architecture.from_directory(arguments.model)
    parallel = parallel_config(arguments, architecture.layers)
    hf_to_megatron(arguments.model, arguments.out, Options(parallel, arguments.dtype, arguments.verify, _progress_bar))
    _print_written(arguments.out)


def _check_checkpoint(arguments: argparse.Namespace) -> None:
    companions = torch_dist.companion_directory(arguments.checkpoint, arguments.hf)
    architecture = Architecture.from_directory(companions)
    held = str(torch_dist.check(arguments.checkpoint, architecture, companions)).removeprefix("torch.")
    _print_sharding(architecture, parallel_config(arguments, architecture.layers), arguments.dtype or held)


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    from fipo_megatron.actor.hf_conversion import Options, megatron_to_hf

    architecture = Architecture.from_directory(torch_dist.companion_directory(arguments.checkpoint, arguments.hf))
    parallel = parallel_config(arguments, architecture.layers)
    options = Options(parallel, arguments.dtype, arguments.verify, _progress_bar)
    megatron_to_hf(arguments.checkpoint, arguments.out, options, arguments.hf)
    _print_written(arguments.out)


def parallel_config(arguments: argparse.Namespace, layers: int) -> ParallelConfig:
    """Returns the layout over the ranks of this job.

    Without ``--pipeline-parallel``, the pipeline gets as many of the remaining ranks as divide the layers.

    Args:
        arguments: Parsed command line.
        layers: Number of layers of the model.
    """
    tensor, expert = arguments.tensor_parallel or 1, arguments.expert_parallel or 1
    world_size = 1 if arguments.meta else launch.rank_and_world_size(os.environ)[1]
    left_over = max(1, world_size // max(tensor, expert))
    stages = max(n for n in range(1, left_over + 1) if left_over % n == 0 and layers % n == 0)
    return ParallelConfig(
        tensor_parallel=tensor,
        pipeline_parallel=arguments.pipeline_parallel or (1 if arguments.meta else stages),
        expert_parallel=expert,
        sequence_parallel=tensor > 1,
    )


def _rank() -> int:
    """Returns the rank of this process; 0 if the launcher's environment is not valid."""
    with suppress(ValueError):
        return launch.rank_and_world_size(os.environ)[0]
    return 0


def _print_sharding(architecture: Architecture, parallel: ParallelConfig, dtype: str) -> None:
    """Prints the size of a model, and of the part that each rank would hold.

    Raises:
        ValueError: the model cannot be sharded like that.
    """
    if problems := architecture.problems(ActorConfig(parallel=parallel)):
        raise ValueError("\n".join(problems))
    item = 2 if dtype != "float32" else 4
    sizes = [count * item for count in local_parameter_counts(architecture, parallel)]
    count = tables.parameter_count(architecture)
    print(f"{architecture.name}: {len(tables.hf_tensors(architecture))} tensors, {count:,} parameters")
    print(f"weights in {dtype}: {_bytes(count * item)}")
    layout = (
        f"tensor {parallel.tensor_parallel}, pipeline {parallel.pipeline_parallel}, expert {parallel.expert_parallel}"
    )
    print(f"per rank ({layout}): {_bytes(min(sizes))} to {_bytes(max(sizes))}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


@contextmanager
def _progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the bytes done on stderr; every 30 seconds if that is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else _NOT_INTERACTIVE_SECONDS
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, mininterval=interval) as bar:
        yield bar.update


def _print_written(out: Path) -> None:
    """Prints the number and size of the files written, on rank 0."""
    if _rank() == 0:
        files = [path for path in out.rglob("*") if path.is_file()]
        print(f"{out}: {len(files)} files, {_bytes(sum(path.stat().st_size for path in files))}")


def _run(convert: Callable[[], None]) -> int:
    """Runs a conversion and returns the exit code; prints errors and their rank on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core warns when it is imported
        try:
            convert()
        except (WeightsError, ValueError, OSError, RuntimeError) as error:
            where = f" on rank {_rank()}" if _rank() else ""
            text = str(error).partition("\n")[0] if _rank() else error  # rank 0 prints the whole list
            print(f"error{where}: {text}", file=sys.stderr)
            return _code_of(error)
    return DONE


def _code_of(error: Exception) -> int:
    if isinstance(error, VerificationError):
        return DIFFERS
    refused = isinstance(error, ValueError | FileExistsError | FileNotFoundError)
    return REFUSED if refused else NOT_WRITTEN


if __name__ == "__main__":
    sys.exit(main())
