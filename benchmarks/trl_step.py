"""Seconds of a training step beside TRL's GRPOTrainer: equal model, prompts, responses and updates, on one CPU thread.

Both sides continue the quickstart's final policy: 32 prompts × 8 responses of at most 48 tokens, then 4 updates of 64
responses. They run in processes of their own, in turn and in both orders. TRL is not a dependency of this project;
install it, and what it needs beside the packages that are here, into a directory of its own:

    python -m pip install --no-deps --target build/trl trl==1.16.0 datasets dill multiprocess xxhash pandas
    python -m examples.quickstart
    OMP_NUM_THREADS=1 python -m benchmarks.trl_step --trl build/trl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result_table import print_table, write_result

PROMPTS, SAMPLES, UPDATES, TOKENS = 32, 8, 4, 48
WARM_UP = 3
PARTS = ("generate and score", "old log-probs", "update", "step")
CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "fipo.yaml"


def fipo_steps(quickstart: Path, steps: int) -> list[dict[str, float]]:
    """Trains with this project in a process of its own; returns seconds of each part, by step."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            *(f"model.path={quickstart}/fipo/hf", f"data.files=[{quickstart}/data/problems.jsonl]"),
            *("evaluation.files=[]", "run.evaluate_every=0", f"run.steps={WARM_UP + steps}", f"run.output={directory}"),
            *(f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}"),
            *("algorithm.dynamic_sampling=false", f"rollout.embedded_slots={PROMPTS * SAMPLES}"),
            *(f"actor.prompts_per_mini_batch={PROMPTS // UPDATES}", "actor.optimizer.lr=1e-7"),
            *("actor.optimizer.min_lr=1e-7", "actor.optimizer.warmup_steps=0"),
        ]
        command = [sys.executable, "-m", "fipo_megatron.train", str(CONFIG), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        timings = [json.loads(line) for line in (Path(directory) / "timing.jsonl").read_text().splitlines()]
        lengths = [
            json.loads(line)["rollout/response_tokens_mean"]
            for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()
        ]
    return [
        {
            "generate and score": timing["time/generate"],
            "old log-probs": timing["time/log_probs"],
            "update": timing["time/update"],
            "step": timing["time/step"],
            "tokens": length,
        }
        for timing, length in zip(timings[WARM_UP:], lengths[WARM_UP:], strict=True)
    ]


def trl_steps(quickstart: Path, steps: int, trl: Path) -> list[dict[str, float]]:
    """Trains with TRL in a process of its own; returns seconds of each part, by step."""
    command = [sys.executable, "-m", "benchmarks.trl_step", "--quickstart", str(quickstart), "--steps", str(steps)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(trl.resolve())])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, "--inside"], check=True, capture_output=True, text=True, env=environment)
    rows: list[dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return rows


def train_with_trl(quickstart: Path, steps: int) -> None:
    """Trains with TRL in this process, and prints the rows of :func:`trl_steps` as JSON."""
    import datasets  # type: ignore[import-not-found]  # as TRL, installed in a directory of its own
    import transformers
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    from fipo_megatron.reward.answers import exact

    rows: list[dict[str, float]] = []
    seconds = {"generate and score": 0.0, "old log-probs": 0.0, "tokens": 0.0}

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]  # untyped: TRL is not installed where types are checked
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start, before = time.perf_counter(), seconds["old log-probs"]
            found = super()._generate_and_score_completions(inputs)
            elapsed = time.perf_counter() - start
            seconds["generate and score"] += elapsed - (seconds["old log-probs"] - before)
            seconds["tokens"] = float(found["completion_mask"].sum() / len(found["completion_mask"]))
            return found

        def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
            import torch

            start = time.perf_counter()
            found = super()._get_per_token_logps_and_entropies(model, *arguments, **named)
            if not torch.is_grad_enabled():
                seconds["old log-probs"] += time.perf_counter() - start
            return found

    class Clock(transformers.TrainerCallback):
        start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % UPDATES:
                return
            now = time.perf_counter()
            step = now - Clock.start
            update = step - seconds["generate and score"] - seconds["old log-probs"]
            rows.append(seconds | {"update": update, "step": step})
            seconds.update(dict.fromkeys(seconds, 0.0))
            Clock.start = time.perf_counter()

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [1.0 if exact(response[0]["content"], truth, ())[0] else -1.0 for response, truth in pairs]

    lines = (quickstart / "data" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    conversations = [one | {"prompt": [{"role": "user", "content": one["prompt"]}]} for one in problems]
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart / "fipo" / "hf")
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            seed=1,
            max_steps=(WARM_UP + steps) * UPDATES,
            per_device_train_batch_size=PROMPTS * SAMPLES // UPDATES,
            steps_per_generation=UPDATES,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            temperature=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            epsilon_high=0.28,
            learning_rate=1e-7,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=UPDATES,
        )
        TimedTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(quickstart / "fipo" / "hf"),
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(conversations),
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    print("\n" + json.dumps(rows[WARM_UP:]))


def main() -> None:
    """Runs both sides in turn and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=Path("build/trl"), help="directory in which TRL is installed")
    parser.add_argument("--quickstart", type=Path, default=Path("build/quickstart"), help="output of the quickstart")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run after three for warming up")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        train_with_trl(arguments.quickstart, arguments.steps)
        return
    rows: dict[str, list[dict[str, float]]] = {"TRL": [], "this project": []}
    for name in ("TRL", "this project", "this project", "TRL"):
        if name == "TRL":
            rows[name] += trl_steps(arguments.quickstart, arguments.steps, arguments.trl)
        else:
            rows[name] += fipo_steps(arguments.quickstart, arguments.steps)
    medians = {
        name: {part: statistics.median(row[part] for row in some) for part in (*PARTS, "tokens")}
        for name, some in rows.items()
    }
    table = [{"seconds": name} | {part: f"{value:.3f}" for part, value in of.items()} for name, of in medians.items()]
    print_table(
        f"{PROMPTS} prompts × {SAMPLES} responses, {UPDATES} updates: medians of {2 * arguments.steps} steps", table
    )
    ratio = medians["this project"]["step"] / medians["TRL"]["step"]
    print(f"\nthis project / TRL: {ratio:.2f}")
    write_result("trl_step", {"medians": medians, "ratio": ratio, "rows": rows})


if __name__ == "__main__":
    main()
