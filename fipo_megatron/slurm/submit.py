"""Submits a job to Slurm with one of the scripts in examples/slurm/, or prints the command.

The scripts are plain sbatch scripts: what `fipo submit` adds is their options and the checks that need no GPU. A
configuration that is not valid, or does not fit the nodes, ends with exit code 2 before anything is submitted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fipo_megatron.config.files import ConfigError, load_config
from fipo_megatron.slurm.job_checks import JobNodes, describe, job_problems, missing_files

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
"""The scripts of this source tree."""

NOT_VALID = 2
_WIDTH = 110
_LOSS_OF_A_NODE = (
    "the loss of a rollout node ends the trainer as well: Slurm lets a job go on without a node only if the trainer "
    "and the servers have at least two nodes each"
)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    given = _parser().parse_intermixed_args(arguments)
    try:
        command, environment, notes = build_command(given)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return NOT_VALID
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(_shown(command, environment)))
    if given.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        print("fipo submit: there is no sbatch here; run it on a login node, or with --dry-run", file=sys.stderr)
        return NOT_VALID
    return subprocess.run(command, env=os.environ | environment, check=False).returncode


def build_command(given: argparse.Namespace) -> tuple[list[str], dict[str, str], list[str]]:
    """Returns the sbatch command, the variables that it is given, and notes for the user.

    Raises:
        ConfigError: The configuration is not valid, does not fit the nodes, or names files that do not exist here.
    """
    config = load_config(given.config, given.overrides)
    trainer = given.nodes - given.rollout_nodes
    if trainer < 1:
        raise ConfigError(f"--rollout-nodes {given.rollout_nodes}: must be less than --nodes {given.nodes}")
    if given.kind == "evaluate" and (given.nodes, given.rollout_nodes) != (1, 0):
        raise ConfigError("--kind evaluate: runs on one node; give --nodes 1 and no --rollout-nodes")
    if given.replace_bad_nodes and given.kind != "train":
        raise ConfigError(f"--replace-bad-nodes: must not be given with --kind {given.kind}, only with train")
    nodes = JobNodes(
        trainer, given.rollout_nodes, given.gpus_per_node, given.ranks_per_node or given.gpus_per_node or 1
    )
    problems = [] if given.kind == "evaluate" else job_problems(config, nodes)
    missing = missing_files(config)
    if not given.dry_run:
        problems += missing
    if problems:
        raise ConfigError("\n".join(f"{given.config}: {problem}" for problem in problems))
    notes = [describe(config, nodes)] if given.kind == "train" else []
    notes += [_LOSS_OF_A_NODE] if given.kind == "train" and nodes.rollout and 1 in (trainer, nodes.rollout) else []
    notes += missing if given.dry_run else []
    # A component of a heterogeneous job has none of the options of the other one.
    kind = "disaggregated" if given.kind == "train" and nodes.rollout else given.kind
    script = _script("colocated" if kind == "train" else kind)
    if kind == "disaggregated":
        components = [["--nodes", str(count), *_options(given)] for count in (trainer, nodes.rollout)]
        options = ["--job-name", given.job_name, *components[0], ":", *components[1]]
    else:
        options = ["--job-name", given.job_name, "--nodes", str(given.nodes), *_options(given)]
    return ["sbatch", *options, script, given.config, *given.overrides], _variables(given), notes


def _options(given: argparse.Namespace) -> list[str]:
    """Returns the options of each component of the job."""
    options = ["--gpus-per-node", str(given.gpus_per_node)] if given.gpus_per_node else []
    for name in ("time", "partition", "account"):
        if (value := getattr(given, name)) is not None:
            options += [f"--{name}", value]
    return [*options, *given.sbatch]


def _variables(given: argparse.Namespace) -> dict[str, str]:
    """Returns the variables of examples/slurm/job.sh that the command line sets."""
    ranks = given.ranks_per_node or given.gpus_per_node
    serving = given.rollout_nodes if given.kind == "preflight" else 0
    found = {
        "FIPO_SCRIPTS": None if _in_working_directory() else str(SCRIPTS),
        "FIPO_PYTHON": given.python,
        "FIPO_SETUP": given.setup,
        "FIPO_CONTAINER": given.container_image,
        "FIPO_MOUNTS": given.container_mounts,
        "FIPO_RANKS": str(ranks) if given.ranks_per_node else None,
        "FIPO_SRUN": given.srun,
        "FIPO_PREFLIGHT": "replace" if given.replace_bad_nodes else None,
        "FIPO_ROLLOUT_NODES": str(serving) if serving else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _in_working_directory() -> bool:
    return SCRIPTS.resolve() == (Path.cwd() / "examples" / "slurm").resolve()


def _script(name: str) -> str:
    path = SCRIPTS / f"{name}.sbatch"
    if not path.is_file():
        raise ConfigError(
            f"{path}: does not exist: fipo submit needs the source tree of fipo_megatron; submit your own copy of the "
            "script with sbatch"
        )
    return f"examples/slurm/{path.name}" if _in_working_directory() else str(path)


def _shown(command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """Returns the command as it can be typed, in lines of readable length; components and the script begin lines."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    line = ""
    for word in _words(command):
        if line and (len(line) + len(word) > _WIDTH or word == ":" or word.endswith(".sbatch")):
            lines.append(line + " \\")
            line = "  "
        line += word if not line.strip() else f" {word}"
    return [*lines, line]


def _words(command: Sequence[str]) -> list[str]:
    """Returns the quoted words of a command; an option and its value are one, so that they stay on one line."""
    words: list[str] = []
    for word in map(shlex.quote, command):
        if words and words[-1].startswith("--") and " " not in words[-1] and "=" not in words[-1] and _is_value(word):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _is_value(word: str) -> bool:
    return not word.startswith("--") and word != ":" and not word.endswith(".sbatch")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the configuration")
    parser.add_argument("--nodes", type=_positive, required=True, metavar="N", help="nodes of the job")
    parser.add_argument(
        "--rollout-nodes",
        type=_count,
        default=0,
        metavar="M",
        help="how many of them run SGLang servers alone (default: 0, servers share the nodes of the trainer)",
    )
    parser.add_argument("--gpus-per-node", type=_count, default=8, metavar="G", help="GPUs of a node (default: 8)")
    parser.add_argument("--ranks-per-node", type=_positive, metavar="R", help="ranks of a trainer node (default: G)")
    parser.add_argument(
        "--kind",
        choices=("train", "evaluate", "preflight"),
        default="train",
        help="what the job does (default: train)",
    )
    parser.add_argument("--job-name", default="fipo", metavar="NAME", help="name of the job (default: fipo)")
    for name in ("time", "partition", "account"):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"--{name} of sbatch")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further option of sbatch: --sbatch=--qos=high"
    )
    parser.add_argument("--srun", metavar="OPTIONS", help="further options of srun: --srun=--cpu-bind=none")
    parser.add_argument("--setup", metavar="FILE", help="file that the job sources: modules, a virtual environment")
    parser.add_argument("--python", metavar="PYTHON", help="Python that has fipo_megatron (default: python3)")
    parser.add_argument("--container-image", metavar="IMAGE", help="image for pyxis")
    parser.add_argument("--container-mounts", metavar="MOUNTS", help="mounts for pyxis (default: working directory)")
    parser.add_argument(
        "--replace-bad-nodes",
        action="store_true",
        help="if the preflight finds bad nodes, start the job again on others instead of ending it",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
