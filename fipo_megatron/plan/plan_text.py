"""The text of a plan: memory by GPU and phase, time of a step, disk space, and layouts that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fipo_megatron.plan.gpu_memory import GIB, PARTS
from fipo_megatron.plan.layout_search import Candidate
from fipo_megatron.plan.plan import Plan, data_parallel_size
from fipo_megatron.weights import tables as weight_tables

_TB = 1e12


def plan_text(plan: Plan) -> str:
    """Returns the whole plan as text."""
    parts = [_head(plan), _memory(plan), _verdict(plan)]
    if plan.time is not None:
        parts.append(_time(plan))
    disk = plan.disk
    parts.append(
        f"Disk: {disk.checkpoint / _TB:.3f} TB per checkpoint, at most {disk.kept_checkpoints} at a time; "
        f"{disk.export / _TB:.3f} TB per export; {disk.total / _TB:.2f} TB in all."
    )
    return "\n\n".join(parts)


def candidates_text(title: str, found: Sequence[tuple[Candidate, Plan]], servers: Sequence[str]) -> str:
    """Returns layouts that fit, with the overrides that each takes.

    Args:
        title: Title of the table.
        found: Layouts with their plans.
        servers: Overrides that all of them take.
    """
    rows = []
    for candidate, plan in found:
        seconds = plan.time.step_seconds if plan.time else candidate.seconds
        overrides = " ".join((*servers, *candidate.changes)) or "(as given)"
        rows.append({"GiB per GPU": _gib(plan.peak_bytes), "s per step": f"{seconds:,.0f}", "with": overrides})
    return f"\n{title}\n{aligned(rows)}"


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows with equal keys as an aligned table; columns of numbers to the right, of words to the left."""
    header = list(rows[0])
    columns = [[name, *(row[name] for row in rows)] for name in header]
    words = [any(cell[:1].isalpha() for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            column[line].ljust(width) if word else column[line].rjust(width)
            for column, width, word in zip(columns, widths, words, strict=True)
        ).rstrip()
        for line in range(len(rows) + 1)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _head(plan: Plan) -> str:
    request, parallel = plan.request, plan.request.config.actor.parallel
    architecture, shape = request.architecture, request.shape
    sizes = {
        "TP": parallel.tensor_parallel,
        "PP": parallel.pipeline_parallel,
        "VPP": parallel.virtual_pipeline,
        "CP": parallel.context_parallel,
        "EP": parallel.expert_parallel,
    }
    layout = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    layout = f"{layout} DP{data_parallel_size(request)}".strip()
    servers = ""
    if plan.responses_per_server is not None:
        tensor = int(request.config.rollout.sglang.get("tp_size", 1))
        where = "the same GPUs" if request.config.rollout.servers.colocated else f"{shape.rollout_gpus} GPUs"
        servers = (
            f"\nServers: {shape.rollout_gpus // tensor} of {tensor} GPUs each on {where}; "
            f"{plan.responses_per_server} responses of full length at a time in each"
        )
    return (
        f"{architecture.name}: {len(weight_tables.hf_tensors(architecture))} tensors, "
        f"{weight_tables.parameter_count(architecture):,} parameters; every parameter has its tensor\n"
        f"Trainer: {shape.trainer_gpus} × {request.device.name} of {request.gpu_bytes / GIB:.1f} GiB, {layout}, "
        f"recompute {request.config.actor.recompute}, layers of {request.layers}{servers}"
    )


def _memory(plan: Plan) -> str:
    """Returns a row for each kind of GPU and phase, in GiB."""
    found = {part for gpu in plan.gpus for phase in gpu.phases for part in phase.parts}
    names = [part for part in PARTS if part in found]
    rows = []
    for gpu in plan.gpus:
        for number, phase in enumerate(gpu.phases):
            cells = {part: _gib(phase.parts[part]) if part in phase.parts else "-" for part in names}
            rows.append({"GiB": "" if number else gpu.name, "phase": phase.name, **cells, "total": _gib(phase.total)})
    return aligned(rows)


def _verdict(plan: Plan) -> str:
    if plan.problems:
        return "Does not fit:\n" + "\n".join(f"  {problem}" for problem in plan.problems)
    return f"Fits: at most {_gib(plan.peak_bytes)} of {_gib(plan.request.gpu_bytes)} GiB."


def _time(plan: Plan) -> str:
    time = plan.time
    assert time is not None
    lengths = time.workload.lengths
    return (
        f"{aligned(time.rows())}\n\n"
        f"Responses of {lengths.mean:,.0f} tokens on average, {time.workload.kept_fraction:.0%} of the groups kept: "
        f"{time.gpu_hours:,.0f} GPU-hours for {time.steps:,} steps on {time.gpus} GPUs. "
        "An estimate: what each number rests on is in the last column."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
