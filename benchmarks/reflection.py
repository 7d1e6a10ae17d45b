"""Trains the quickstart's task with re-checks in its examples and counts Oops and Aha in two ways.

python -m benchmarks.reflection [--output DIRECTORY] [--steps N]

Half of the examples write a doubt ("Wait, check again.") and a second answer after the first one, right or wrong. The
metrics ``moments/*`` of the run are compared with a count that only splits the responses at the word ``Answer: ``.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from examples.quickstart import task
from examples.quickstart.tiny_model import build_model
from examples.quickstart.two_stages import Stages, train_fipo, train_sft
from fipo_megatron.moments.candidates import CandidateExtractor, snippet
from fipo_megatron.moments.transitions import moments_of
from fipo_megatron.reward import answers
from fipo_megatron.rollout import carry_over

DOUBTS = ("Wait, check again.", "Let me recheck.", "Again.")
"""The last one is no reflection phrase."""
RECHECKED, MENDED = 0.5, 0.6
"""Probability of a re-check, and that its answer is right whatever the first one was."""


def example(numbers: task.Digits, rng: random.Random) -> str:
    """Returns an answer of the quickstart, with or without a re-check."""
    first = task.example(numbers, task.STARTING if rng.random() < 0.3 else task.WARM, rng)
    if rng.random() >= RECHECKED:
        return first
    truth = sum(numbers) % 10
    second = truth if rng.random() < MENDED else (truth + rng.randint(1, 9)) % 10
    return f"{first}\n{rng.choice(DOUBTS)}\nAnswer: {second}"


def build(directory: Path, seed: int) -> None:
    """Writes the quickstart's data with these examples, and a model whose tokenizer knows them."""
    task.build(directory, seed)
    rng = random.Random(seed)
    file = directory / "examples.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        numbers = row["prompt"].removeprefix("Last digit of ").removesuffix("?").split("+")
        row["response"] = example(tuple(map(int, numbers)), rng)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = [f"user\n{row['prompt']}\nassistant\n{row['response']}" for row in rows[-2000:]]
    build_model(directory / "model", corpus, seed, max_positions=192)


def direct_count(text: str, truth: str) -> tuple[bool, bool]:
    """Returns Oops and Aha of a response by its lines ``Answer: …`` alone."""
    right = [line.removeprefix("Answer: ").strip() == truth for line in text.split("\n") if line.startswith("Answer: ")]
    several = len(right) > 1
    return several and any(right[:-1]) and not right[-1], several and not right[0] and right[-1]


def main() -> None:
    """Trains and prints both counts, step by step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/reflection"), help="directory (build/reflection)")
    parser.add_argument("--steps", type=int, default=20, help="steps of FIPO (default: 20)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    data = output / "data"
    stages = Stages(
        output,
        model=data / "model",
        examples=data / "examples.jsonl",
        problems=data / "problems.jsonl",
        held_out=data / "held_out.jsonl",
    )
    if not (stages.sft / "hf").exists():
        build(data, stages.seed)
        config = output / "sft.yaml"
        here = stages.sft_config.resolve()
        config.write_text(f"base: {here}\nrollout: {{max_response_tokens: 80}}\n", encoding="utf-8")
        train_sft(replace(stages, sft_config=config))
    overrides = ["observe.moments=true", "run.record_rollouts=true", "rollout.max_response_tokens=80"]
    overrides += [f"run.steps={arguments.steps}", "run.evaluate_every=0"]
    train_fipo(stages, overrides)
    _print(stages.fipo)


def by_moments(text: str, truth: str, extractor: CandidateExtractor) -> tuple[bool, bool]:
    """Returns Oops and Aha of a response by the code of the metrics."""
    cleaned, candidates = extractor(text)
    right = [answers.exact(snippet(candidate, "exact"), truth)[0] for candidate in candidates]
    found = moments_of(cleaned, candidates, right, extractor)
    return found.oops, found.aha


def _print(run: Path) -> None:
    """Prints the metrics of the run, and both counts over the recorded responses of the kept groups."""
    tokenizer, extractor = AutoTokenizer.from_pretrained(run / "hf"), CandidateExtractor()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print("      all scored responses                         | kept groups: by lines   by moments  differing")
    print("step  responses  several   Oops strict    Aha strict | responses   Oops    Aha   Oops    Aha responses")
    for row in rows:
        names = ("responses", "several", "oops", "oops_strict", "aha", "aha_strict")
        metrics = "{:9} {:8} {:6} {:6} {:6} {:6}".format(*(row[f"moments/{name}"] for name in names))
        pairs = []
        for file in run.glob(f"rollouts/step-{row['step']:06}-*.npz"):
            groups, _ = carry_over.deserialize_groups(file.read_bytes())
            for one in (trajectory for group in groups for trajectory in group.trajectories):
                if one.finish_reason != "length":
                    text = str(tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True))
                    truth = one.prompt.ground_truth
                    pairs.append((direct_count(text, truth), by_moments(text, truth, extractor)))
        sums = [sum(pair[way][kind] for pair in pairs) for way in (0, 1) for kind in (0, 1)]
        differing = sum(a != b for a, b in pairs)
        print(f"{row['step']:4}  {metrics} | {len(pairs):9} " + " ".join(f"{n:6}" for n in sums) + f" {differing:9}")


if __name__ == "__main__":
    main()
