"""Trains a tiny model with FIPO on this machine: `make quickstart`, or

python -m examples.quickstart [--seed N] [--output DIRECTORY] [key=value ...]

First builds a starting model by supervised fine-tuning on mostly terse, mostly wrong answers, then trains it with FIPO.
``key=value`` overrides the configuration of the second part: ``algorithm.kind=dapo``, ``rollout.engine=sglang``,
``actor.parallel.context_parallel=2`` with --ranks 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from examples.quickstart import task

HERE = Path(__file__).parent


def train(config: str, overrides: list[str], ranks: int = 1) -> float:
    """Runs fipo_megatron.train in processes of its own; seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    start = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "fipo_megatron.train", str(HERE / config), *overrides]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    return time.perf_counter() - start


def main() -> None:
    """Data and starting model, supervised fine-tuning, FIPO; then says what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/quickstart"))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    output: Path = arguments.output
    start, run = output / "sft", output / "fipo"
    if (run / "metrics.jsonl").exists():
        print(f"{output}: holds a quickstart already; it goes on, or --output says where to make another")
    seconds = 0.0
    if not (start / "hf").exists():
        task.build(output / "data", arguments.seed)
        seconds = train(
            "sft.yaml",
            [
                *(f"seed={arguments.seed}", f"run.output={start}", f"model.path={output}/data/model"),
                f"data.files=[{output}/data/examples.jsonl]",
            ],
        )
    seconds += train(
        "fipo.yaml",
        [
            *(f"seed={arguments.seed}", f"run.output={run}", f"model.path={start}/hf"),
            *(f"data.files=[{output}/data/problems.jsonl]", f"evaluation.files=[{output}/data/held_out.jsonl]"),
            *arguments.overrides,
        ],
        arguments.ranks,
    )
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    print("\n  step   accuracy on 256 held-out problems   response tokens")
    for row in rows:
        print(f"  {row['step']:4}   {row['evaluation/accuracy']:33.1%}   {row['evaluation/response_tokens']:15.1f}")
    print(
        f"""
  {seconds:.0f} s. What there is now:
    {run}/metrics.jsonl, evaluation.jsonl, timing.jsonl   every step in numbers; tensorboard/ has them, too
    {run}/trajectories/                                   some responses of every step
    {run}/checkpoints/                                    to go on from: run it again with run.steps=120
    {run}/hf/                                             the policy, for transformers or SGLang
  What to try next:
    python -m fipo_megatron.report {run}
    python -m examples.quickstart --output build/dapo algorithm.kind=dapo
    python -m examples.quickstart --output build/cp2 --ranks 2 actor.parallel.context_parallel=2
    python -m fipo_megatron.config examples/configs/fipo_qwen2.5_32b.yaml   the same program for 32B"""
    )


if __name__ == "__main__":
    main()
