"""What the two converters have in common: arguments, progress, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture
from fipo_megatron.weights.hf_directory import WeightsError
from fipo_megatron.weights.sharding import Split, share_sizes

DONE, REFUSED, USAGE, NOT_WRITTEN, DIFFERS = 0, 1, 2, 3, 4
EXIT_CODES = """exit codes:
  0  done
  1  the files, or the way to spread them, are not fit: nothing was written
  2  wrong arguments
  3  could not be written, disk full for example: nothing is left under the name
  4  --verify found differences: nothing is left under the name
"""
_NOT_INTERACTIVE_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    """Adds what both converters take."""
    for name, what in (
        ("tensor", "ranks that share every matrix"),
        ("pipeline", "stages that share the layers"),
        ("expert", "ranks that share the experts of a mixture"),
    ):
        parser.add_argument(
            f"--{name}-parallel", type=_positive, metavar="N", help=f"{what} while converting (default: see below)"
        )
    parser.add_argument("--dtype", choices=dtypes, help="of the result (default: holds what is there exactly)")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it, bit for bit")
    parser.add_argument(
        "--meta", action="store_true", help="check names and shapes only; reads no weights, writes nothing"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parallel_config(arguments: argparse.Namespace, layers: int) -> ParallelConfig:
    """How the model is spread over the ranks of this job; what is not given goes to the pipeline, as far as it can."""
    tensor, expert = arguments.tensor_parallel or 1, arguments.expert_parallel or 1
    left_over = max(1, _ranks() // max(tensor, expert))
    stages = max(n for n in range(1, left_over + 1) if left_over % n == 0 and layers % n == 0)
    return ParallelConfig(
        tensor_parallel=tensor,
        pipeline_parallel=arguments.pipeline_parallel or (1 if arguments.meta else stages),
        expert_parallel=expert,
        sequence_parallel=tensor > 1,
    )


def _ranks() -> int:
    """Of this job, as ``actor.parallel.Launch`` reads it, which --meta does without."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ:
            return int(os.environ.get(size, 1))
    return 1


def report_shares(architecture: Architecture, parallel: ParallelConfig, dtype: str) -> None:
    """Prints what a model consists of and what each rank would hold.

    Raises:
        ValueError: it cannot be spread like that.
    """
    if problems := architecture.problems(ActorConfig(parallel=parallel)):
        raise ValueError("\n".join(problems))
    split = Split(
        parallel.tensor_parallel,
        parallel.pipeline_parallel,
        parallel.virtual_pipeline,
        parallel.expert_parallel,
        parallel.expert_tensor_size,
    )
    item = 2 if dtype != "float32" else 4
    sizes = [size * item for size in share_sizes(architecture, split)]
    count = tables.parameter_count(architecture)
    print(f"{architecture.name}: {len(tables.hf_tensors(architecture))} tensors, {count:,} parameters")
    print(f"weights in {dtype}: {_bytes(count * item)}")
    print(f"per rank (tensor {split.tensor}, pipeline {split.pipeline}, expert {split.expert}): ", end="")
    print(f"{_bytes(min(sizes))} to {_bytes(max(sizes))}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes done, on stderr; every half minute where that is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else _NOT_INTERACTIVE_SECONDS
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, mininterval=interval) as bar:
        yield bar.update


def say_written(out: Path) -> None:
    """Prints what is there now, on rank 0."""
    if _rank() == 0:
        files = [path for path in out.rglob("*") if path.is_file()]
        print(f"{out}: {len(files)} files, {_bytes(sum(path.stat().st_size for path in files))}")


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def exit_code(convert: Callable[[], None]) -> int:
    """Runs a conversion; says on stderr what went wrong, and on which rank."""
    warnings.simplefilter("ignore")  # of Megatron-Core's imports
    try:
        convert()
    except (WeightsError, ValueError, OSError, RuntimeError) as error:
        where = f" on rank {_rank()}" if _rank() else ""
        text = str(error).partition("\n")[0] if _rank() else error  # the first rank has the whole list
        print(f"error{where}: {text}", file=sys.stderr)
        return _code_of(error)
    return DONE


def _code_of(error: Exception) -> int:
    if type(error).__name__ == "VerificationError":  # its module imports Megatron-Core, which --meta does without
        return DIFFERS
    refused = isinstance(error, ValueError | FileExistsError | FileNotFoundError)
    return REFUSED if refused else NOT_WRITTEN
