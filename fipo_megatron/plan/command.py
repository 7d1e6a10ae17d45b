"""The command ``fipo plan``: reads its arguments, plans, prints the tables, writes plan.json and the picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fipo_megatron.config import Config, layout_conflicts, load_config
from fipo_megatron.storage.atomic import write_atomic

if TYPE_CHECKING:
    from fipo_megatron.observe.devices import Device
    from fipo_megatron.plan.plan import Plan, Report, Request
    from fipo_megatron.plan.step_estimate import ClusterShape, Workload
    from fipo_megatron.plan.trace import Layers
    from fipo_megatron.plan.tracing import Tracer
    from fipo_megatron.weights.architecture import Architecture

_DESCRIPTION = """\
Plans a run before it is queued: memory of each kind of GPU, whether it fits, time of a step, disk space.

Needs no GPU and reads no weights: of model.path, config.json is enough, and it may be that file. The actor itself is
built on fake tensors, with fake process groups of the whole job. docs/planning.md describes the figures.
"""
_EXIT_CODES = "Exit codes: 0 the run fits; 1 it does not fit; 2 the configuration or an argument is not valid."
FITS, TOO_LARGE, NOT_VALID = 0, 1, 2

_UNITS = {"": 2**30, "GiB": 2**30, "GB": 10**9}
_PROPOSED, _SEARCHED = 3, 10
_MOST_GPUS = 2**16


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        return _run(_request(options), options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return NOT_VALID


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo plan",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="configuration of the run, with its layout")
    add("overrides", nargs="*", metavar="key=value", help="overrides, as for fipo train")
    add("--gpus", type=_positive, metavar="N", help="GPUs of the job (default: the fewest whole nodes for the layout)")
    add(
        "--rollout-gpus",
        type=_positive,
        metavar="N",
        help="of these, GPUs of the servers, if not colocated (default: half)",
    )
    add("--gpus-per-node", type=_positive, default=8, metavar="N", help="GPUs per node (default: 8)")
    add("--device", default="h100", metavar="NAME", help="kind of GPU: h100, h200, a100-80, b200, … (default: h100)")
    add("--gpu-memory", type=_memory, metavar="SIZE", help="memory of a GPU, such as 80GiB (default: the device's)")
    add(
        "--layers",
        choices=("transformer_engine", "torch"),
        help="layers of the actor (default: torch if actor.transformer.transformer_impl is local)",
    )
    add("--mean-response", type=_positive, metavar="TOKENS", help="mean response length (default: half the limit)")
    add("--kept-groups", type=float, metavar="FRACTION", help="groups that dynamic sampling keeps (default: 0.6)")
    add("--search", action="store_true", help=f"try all layouts and print the {_SEARCHED} fastest that fit")
    add("--output", type=Path, metavar="DIR", help="directory for plan.json and plan.png (default: none is written)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 80GiB or 85GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _request(options: argparse.Namespace) -> Request:
    """Reads the configuration and the model's config.json, and checks them with the number of GPUs.

    Raises:
        ValueError: Something is not valid: the same sentences as of ``fipo train``.
    """
    from fipo_megatron.observe.devices import device
    from fipo_megatron.plan.gpu_memory import GIB
    from fipo_megatron.plan.plan import Request
    from fipo_megatron.rollout.engine_factory import context_problem

    config = load_config(options.config, options.overrides)
    architecture = _architecture(config)
    kind = device(options.device)
    shape = _shape(options, config)
    problems = architecture.problems(config.actor)
    problems += layout_conflicts(config.actor.parallel, shape.trainer_gpus)
    if problem := context_problem(config, architecture.max_positions):
        problems.append(problem)
    local = config.actor.transformer.get("transformer_impl") == "local"
    layers: Layers = options.layers or ("torch" if local else "transformer_engine")
    problems += _device_problems(config, architecture, kind, layers)
    if problems:
        raise ValueError("\n".join(problems))
    memory = options.gpu_memory or int(kind.memory_gib * GIB)
    if layers == "torch" and not local:  # the estimate of the time reads it there
        transformer = config.actor.transformer | {"transformer_impl": "local"}
        config = replace(config, actor=replace(config.actor, transformer=transformer))
    return Request(config, architecture, shape, kind, memory, layers, _workload(options, config))


def _device_problems(config: Config, architecture: Architecture, device: Device, layers: str) -> list[str]:
    """Lists what the layers or the device do not have, as the actor would on that device."""
    problems = []
    if config.actor.fp8 != "off" and (layers == "torch" or device.fp8_flops is None):
        missing = "Transformer Engine's layers" if layers == "torch" else f"FP8, which {device.name} does not have"
        problems.append(f"actor.fp8 = {config.actor.fp8}: needs {missing}; valid: off")
    if architecture.mixture and layers == "torch":
        problems.append(f"{architecture.name}: a mixture of experts on CUDA needs Transformer Engine")
    return problems


def _shape(options: argparse.Namespace, config: Config) -> ClusterShape:
    """Returns the GPUs of trainer and servers, by default the fewest whole nodes over which the layout can be set up.

    Raises:
        ValueError: The servers would leave no GPU to the trainer.
    """
    from fipo_megatron.plan.step_estimate import ClusterShape

    nodes = options.gpus_per_node
    if options.gpus is None:
        for gpus in range(nodes, _MOST_GPUS, nodes):
            shape = ClusterShape.of_run(config, gpus, nodes)
            if not layout_conflicts(config.actor.parallel, shape.trainer_gpus):
                break
        return shape
    shape = ClusterShape.of_run(config, options.gpus, nodes)
    if options.rollout_gpus is not None and shape.trainer_gpus < options.gpus:
        shape = ClusterShape(options.gpus - options.rollout_gpus, options.rollout_gpus, nodes)
    if shape.trainer_gpus < 1:
        raise ValueError(f"--rollout-gpus {options.rollout_gpus}: must be below --gpus {options.gpus}")
    return shape


def _workload(options: argparse.Namespace, config: Config) -> Workload:
    from fipo_megatron.plan.response_lengths import ResponseLengths
    from fipo_megatron.plan.step_estimate import Workload

    workload = Workload.default(config)
    if (mean := options.mean_response) is not None:
        lengths = workload.lengths
        limit = config.rollout.max_response_tokens
        workload = replace(workload, lengths=ResponseLengths.from_mean(mean, limit, prompt=lengths.prompt))
    if options.kept_groups is not None:
        workload = replace(workload, kept_fraction=options.kept_groups)
    return workload


def _architecture(config: Config) -> Architecture:
    from fipo_megatron.storage.json_files import read_json_object
    from fipo_megatron.weights.architecture import Architecture

    if not config.model.path:
        raise ValueError("model.path: missing; the directory of the model, or its config.json")
    path = Path(config.model.path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model.path = {path}: there is no such directory with a config.json, and no such file")
    try:
        return Architecture.from_hf(read_json_object(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _run(request: Request, options: argparse.Namespace) -> int:
    """Plans, prints, writes the files; returns the exit code."""
    from fipo_megatron.plan import plan_text
    from fipo_megatron.plan.plan import make_plan
    from fipo_megatron.plan.tracing import Tracer

    start = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {line}", file=sys.stderr, flush=True)

    report("building the actor on fake tensors")
    with Tracer() as tracer:
        plan = make_plan(request, tracer, report)
        print(plan_text.plan_text(plan))
        if options.output is not None:
            _write(plan, options.output)
        if options.search or plan.problems:
            _propose(request, plan, options.search, tracer, report)
    return TOO_LARGE if plan.problems else FITS


def _propose(request: Request, plan: Plan, search: bool, tracer: Tracer, report: Report) -> None:
    """Prints the fastest layouts of all, or the changes that would make the run fit."""
    from fipo_megatron.plan import plan_text
    from fipo_megatron.plan.layout_search import confirmed, fitting_layouts, nearest, with_fitting_servers

    changed, servers = with_fitting_servers(request)
    candidates = fitting_layouts(changed, tracer, report)
    title = f"The {_SEARCHED} fastest of {len(candidates)} layouts that fit" if search else "Changes that fit"
    ordered = candidates if search else nearest(candidates)
    found = confirmed(ordered, _SEARCHED if search else _PROPOSED, tracer, report)
    if found:
        print(plan_text.candidates_text(title, found, servers))
    else:
        print("No layout of these GPUs fits; more GPUs, or shorter sequences, are needed.")


def _write(plan: Plan, directory: Path) -> None:
    """Writes plan.json and, if matplotlib is installed, plan.png."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "plan.json", json.dumps(plan.as_dict(), indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("plan.png: not drawn, matplotlib is not installed (pip install 'fipo-megatron[report]')", file=sys.stderr)
        return
    from fipo_megatron.plan.memory_picture import draw

    write_atomic(directory / "plan.png", draw(plan))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
