"""Trains a tiny model with FIPO on this machine: `make quickstart`, or

python -m examples.quickstart [--seed N] [--output DIRECTORY] [--ranks N] [key=value ...]

Supervised fine-tuning on mostly terse, mostly wrong answers builds a starting model; FIPO then trains it. Overrides
``key=value`` apply to FIPO: ``algorithm.kind=dapo``, ``rollout.engine=sglang``, or
``actor.parallel.context_parallel=2`` with --ranks 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from examples.quickstart import task
from examples.quickstart.two_stages import Stages, train_fipo, train_sft


def main() -> None:
    """Builds the data, runs supervised fine-tuning and FIPO, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="seed of data, model and runs (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/quickstart"),
        help="directory for data/, sft/ and fipo/ (default: build/quickstart)",
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the FIPO run (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of fipo.yaml")
    arguments = parser.parse_args()
    output: Path = arguments.output
    data = output / "data"
    stages = Stages(
        output,
        model=data / "model",
        examples=data / "examples.jsonl",
        problems=data / "problems.jsonl",
        held_out=data / "held_out.jsonl",
        seed=arguments.seed,
    )
    fipo = stages.fipo
    if (fipo / "metrics.jsonl").exists():
        print(f"{output}: contains a quickstart, which is resumed; use --output for another directory")
    seconds = 0.0
    if not (stages.sft / "hf").exists():
        task.build(data, arguments.seed)
        seconds = train_sft(stages)
    seconds += train_fipo(stages, arguments.overrides, arguments.ranks)
    rows = [json.loads(line) for line in (fipo / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    print("\n  step   accuracy on 256 held-out problems   response tokens")
    for row in rows:
        print(f"  {row['step']:4}   {row['evaluation/accuracy']:33.1%}   {row['evaluation/response_tokens']:15.1f}")
    command = "fipo " if shutil.which("fipo") else "python -m fipo_megatron."
    print(
        f"""
  {seconds:.0f} s. Results:
    {fipo}/metrics.jsonl, evaluation.jsonl, timing.jsonl   metrics of every step, also in tensorboard/
    {fipo}/trajectories/                                   some responses of every step
    {fipo}/checkpoints/                                    to resume from: run it again with run.steps=120
    {fipo}/hf/                                             the policy, for transformers or SGLang
  Next steps:
    {command}report {fipo}
    python -m examples.quickstart --output build/dapo algorithm.kind=dapo
    python -m examples.quickstart --output build/cp2 --ranks 2 actor.parallel.context_parallel=2
    {command}config examples/configs/fipo_qwen2.5_32b.yaml   the same program for 32B"""
    )


if __name__ == "__main__":
    main()
