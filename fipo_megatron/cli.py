"""The console command ``fipo``: one name for the programs of the package.

Each command imports its own module only, so that ``fipo --help`` imports neither torch nor Megatron-Core.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

USAGE = 2
"""Exit code for wrong arguments."""

COMMANDS = {
    "train": ("fipo_megatron.train", "CONFIG [key=value ...]", "train a policy, or resume its run"),
    "evaluate": ("fipo_megatron.evaluate", "CONFIG [key=value ...]", "compute avg@k, cons@k and pass@k of a model"),
    "compare": (
        "fipo_megatron.compare.__main__",
        "shift|swap CONFIG [key=value ...]",
        "compare two models token by token",
    ),
    "config": ("fipo_megatron.config.__main__", "CONFIG [key=value ...]", "check and print the complete configuration"),
    "plan": (
        "fipo_megatron.plan.command",
        "CONFIG [key=value ...]",
        "plan memory and time of a run before it is queued",
    ),
    "stress": (
        "fipo_megatron.stress.stress_command",
        "CONFIG [key=value ...]",
        "measure engine and actor at long sequences",
    ),
    "convert": (
        "fipo_megatron.convert",
        "hf-to-megatron|megatron-to-hf ...",
        "convert weights between Hugging Face and Megatron",
    ),
    "preflight": (
        "fipo_megatron.preflight.__main__",
        "CONFIG [key=value ...]",
        "examine the nodes of a job before it starts",
    ),
    "submit": ("fipo_megatron.slurm.submit", "CONFIG [key=value ...] --nodes N", "submit a job to Slurm, or print it"),
    "moments": ("fipo_megatron.moments.__main__", "RUN|FILE ...", "count Oops and Aha moments in responses"),
    "report": ("fipo_megatron.report.__main__", "RUN [RUN ...]", "draw the curves of one or several runs"),
}
"""Module, arguments and summary of each command. The module has ``main(arguments) -> int``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: The command and its own arguments; None reads them from ``sys.argv``.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("", "-h", "--help"):
        print(_usage())
        return 0 if command else USAGE
    if command == "--version":
        print(f"fipo {_version()}")
        return 0
    if command not in COMMANDS:
        print(_unknown(command), file=sys.stderr)
        return USAGE
    code: int = importlib.import_module(COMMANDS[command][0]).main(rest)
    return code


def _usage() -> str:
    forms = {name: f"fipo {name} {arguments}" for name, (_, arguments, _) in COMMANDS.items()}
    width = max(map(len, forms.values()))
    lines = [f"  {form:<{width}}  {COMMANDS[name][2]}" for name, form in forms.items()]
    return "\n".join(
        [
            "usage: fipo COMMAND ...",
            "",
            *lines,
            "",
            "fipo COMMAND --help describes a command; fipo --version prints the version.",
            "On several ranks: torchrun --nproc-per-node N -m fipo_megatron.cli train CONFIG",
        ]
    )


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"fipo: unknown command {command!r}; {hint}"


def _version() -> str:
    try:
        return importlib.metadata.version("fipo-megatron")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from a source tree)"


if __name__ == "__main__":
    sys.exit(main())
