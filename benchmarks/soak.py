"""Soak test: 200 steps of the quickstart. Measures anonymous memory per process, leftovers and time by part.

Trajectory files are written with token values and limited to 1 MiB in total.

python -m benchmarks.soak [--steps N] [key=value ...]

Needs the starting model of ``make quickstart`` in build/quickstart. Exit code 1: memory changed by more than 5 %
between the second and the last quarter of the run, files or processes are left, trajectory files exceed their limit,
observing takes more than 2 % of the time, or the collapse alarm has triggered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.memory import anonymous
from benchmarks.result_table import print_table, write_result

START = Path("build/quickstart")
TOLERANCE = 0.05
OBSERVING = 0.02
KEPT = ["observe.trajectory_tokens=true", "observe.trajectory_mib=1", "observe.trajectory_file_mib=0.25"]
LIBRARY_DIRECTORIES = (Path(tempfile.gettempdir()), Path("/dev/shm"))
"""Directories in which libraries create files."""


def main() -> int:
    """Runs the quickstart and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if not (START / "sft" / "hf").is_dir():
        sys.exit(f"{START}/sft/hf: no starting model; run make quickstart first")
    with tempfile.TemporaryDirectory(dir="build") as directory:
        output = Path(directory) / "run"
        command = [sys.executable, "-m", "fipo_megatron.train", "examples/quickstart/fipo.yaml"]
        settings = [f"run.steps={arguments.steps}", f"run.output={output}", *KEPT, *arguments.overrides]
        before = files()
        process = subprocess.Popen([*command, *settings])
        seen, memory = watch(process, output / "metrics.jsonl")
        if process.returncode:
            return process.returncode
        return report(arguments, memory, seen, files() - before, output)


def files() -> set[str]:
    """Lists the files in these directories, without torch's cache of compiled code, which all runs share."""
    found = (path for folder in LIBRARY_DIRECTORIES if folder.is_dir() for path in folder.iterdir())
    return {str(path) for path in found if not path.name.startswith("torchinductor_")}


def watch(
    process: subprocess.Popen[bytes], metrics: Path
) -> tuple[list[psutil.Process], dict[str, list[tuple[int, float]]]]:
    """Watches a run until it ends; returns its processes, and per process pairs of step and anonymous MiB."""
    root = psutil.Process(process.pid)
    seen: dict[int, psutil.Process] = {}
    memory: dict[str, list[tuple[int, float]]] = defaultdict(list)
    while process.poll() is None:
        step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        try:
            family = [root, *root.children(recursive=True)]
            for one in family:
                seen[one.pid] = one
                if mib := anonymous(one.pid) / 2**20:
                    memory[f"{'trainer' if one == root else 'child'} {one.pid}"].append((step, mib))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.5)
    return list(seen.values()), memory


def report(
    arguments: argparse.Namespace,
    memory: dict[str, list[tuple[int, float]]],
    seen: list[psutil.Process],
    left: set[str],
    output: Path,
) -> int:
    """Prints and writes the results; returns the exit code."""
    steps, rows, growth = arguments.steps, [], {}
    for name, samples in memory.items():
        early = [mib for step, mib in samples if steps // 4 <= step < steps // 2]
        late = [mib for step, mib in samples if 3 * steps // 4 <= step < steps]
        if not early or not late:
            continue  # a short-lived process, such as a compiler
        growth[name] = statistics.mean(late) / statistics.mean(early) - 1
        rows.append(
            {
                "process": name.split()[0],
                "2nd quarter MiB": f"{statistics.mean(early):.1f}",
                "last quarter MiB": f"{statistics.mean(late):.1f}",
                "change": f"{growth[name]:+.1%}",
            }
        )
    alive = [f"{one.pid} {one.name()}" for one in seen if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    print_table(f"memory over {steps} steps", rows)
    times = [json.loads(line) for line in (output / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = sorted({tag for row in times for tag in row if tag.startswith("time/")})
    seconds = {tag.removeprefix("time/"): statistics.mean(row.get(tag, 0.0) for row in times) for tag in parts}
    observing = seconds["observe"] / seconds["step"]
    kept = sum(file.stat().st_size for file in (output / "trajectories").iterdir())
    alarms = (output / "alarms.jsonl").exists()
    print_table("a step by part", [{"part": part, "seconds": f"{value:.4f}"} for part, value in seconds.items()])
    print(f"\nprocesses left: {alive or 'none'}; files left: {sorted(left) or 'none'}")
    print(f"observing: {observing:.2%} of the time; trajectory files: {kept / 2**20:.2f} MiB; alarm: {alarms}")
    write_result(
        "soak",
        {
            "steps": steps,
            "overrides": arguments.overrides,
            "memory_growth": [{"process": name.split()[0], "growth": value} for name, value in growth.items()],
            "seconds_per_step": seconds,
            "processes_left": alive,
            "files_left": len(left),
            "observation_share": observing,
            "trajectory_bytes": kept,
            "alarm": alarms,
        },
    )
    flat = bool(growth) and all(abs(value) <= TOLERANCE for value in growth.values())
    quiet = observing <= OBSERVING and kept <= 2**20 and not alarms
    return 0 if flat and quiet and not alive and not left else 1


if __name__ == "__main__":
    sys.exit(main())
