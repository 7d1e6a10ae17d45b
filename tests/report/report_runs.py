"""Synthetic run directories for the tests of the report, with the tags and typical values of real runs."""

import json
import math
import random

import yaml

from fipo_megatron.algorithm.loss_statistics import QUANTILES, SIGNS

HOSTILE = "</script><img src=x onerror=\"document.title='broken into'\"><!-- <script>alert(1)</script> \u2028 &lt;b&gt;"


def make_run(
    path, *, steps=80, planned=None, lr=3e-4, collapse=None, seed=0, tokens=True, alarm=None, data_sets=("held_out",)
):
    """Writes a run that improves, and gets worse from the step ``collapse`` on."""
    draw = random.Random(seed)
    path.mkdir(parents=True)
    write(path / "metrics.jsonl", [{"step": s} | metrics(s, collapse, draw) for s in range(steps)])
    write(path / "timing.jsonl", [{"step": s} | timing(s, collapse, draw) for s in range(steps)])
    evaluated = [*range(0, steps, 10), steps]
    write(path / "evaluation.jsonl", [{"step": s} | evaluation(s, collapse, data_sets, draw) for s in evaluated])
    (path / "config.yaml").write_text(yaml.safe_dump(config(path, planned or steps, lr)))
    if alarm is not None:
        reason = "policy KL 0.031 is above 0.01 while the length fell to 0.4 of its best"
        write(path / "alarms.jsonl", [{"step": alarm, "action": "stop", "reason": reason}])
    for first in range(0, steps, 40):
        rows = [
            trajectory(s, i, collapse, draw, tokens) for s in range(first, min(first + 40, steps)) for i in range(4)
        ]
        write(path / "trajectories" / f"from-{first:06d}.jsonl", rows)
    return path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(path, steps, lr):
    return {
        "run": {"steps": steps, "output": str(path), "evaluate_every": 10},
        "algorithm": {"kind": "fipo", "weight_low": 1.0, "weight_high": 1.2},
        "actor": {"optimizer": {"lr": lr, "warmup_steps": 12}, "parallel": {"tensor_parallel": 1}},
        "evaluation": {"files": ["held_out.jsonl"], "samples_per_prompt": 2},
    }


def health(step, collapse):
    """Returns the accuracy and the extent of the collapse, both from 0 to 1."""
    broken = 0.0 if collapse is None else min(1.0, max(0.0, (step - collapse) / 15))
    return (0.18 + 0.7 * (1 - math.exp(-step / 12))) * (1 - 0.7 * broken), broken


def metrics(step, collapse, draw):
    good, broken = health(step, collapse)
    noise = draw.gauss
    accuracy = min(1, max(0, good + noise(0, 0.02)))
    length = (12 + 20 * (1 - math.exp(-step / 8))) * (1 - 0.5 * broken)
    kl = (2e-4 + 1e-4 * noise(0, 0.4)) * (1 + 60 * broken)
    shift = 2e-3 * (1 + 12 * broken) * math.exp(noise(0, 0.1))
    weights = {"mean": 1.005 + 0.05 * broken, "min": 1.0, "max": min(1.2, 1.09 + 0.03 * noise(0, 1) + 0.2 * broken)}
    values = {
        "rollout/accuracy": accuracy,
        "rollout/reward": 2 * accuracy - 1,
        **{
            f"rollout/response_tokens_{name}": max(1.0, length * factor + noise(0, 0.5))
            for name, factor in {"min": 0.3, "q25": 0.7, "mean": 1, "median": 0.95, "q75": 1.25, "max": 1.7}.items()
        },
        "rollout/truncated_fraction": abs(noise(0, 0.01)),
        "sampler/batches": draw.choice([1, 2, 2, 3]),
        "policy/loss": noise(-0.1, 0.1),
        "policy/policy_kl": kl,
        "policy/shift_abs_mean": shift,
        "policy/shift_abs_max": 30 * shift,
        "policy/clip_fraction_low": 0.002 * abs(noise(0, 1)) + 0.05 * broken,
        "policy/clip_fraction_high": 0.003 * abs(noise(0, 1)) + 0.01 * broken,
        "policy/dual_clip_fraction": 0.0005 * broken,
        "policy/advantage_mean": 0.3 * math.exp(-step / 30) + noise(0, 0.05),
        "policy/entropy": 0.32 * math.exp(-step / 40) + 0.3 * broken + 0.01 * noise(0, 1),
        "optimizer/grad_norm": 0.4 * math.exp(noise(0, 0.2)) * (1 + 9 * broken),
        "optimizer/learning_rate": 3e-4,
        "future_kl/abs_mean": 4 * shift,
        "future_kl/abs_max": 50 * shift,
        "mismatch/abs_mean": 2e-4 * math.exp(noise(0, 0.1)),
        "mismatch/future_kl_abs_mean": 5e-4 * math.exp(noise(0, 0.1)),
    }
    values |= {f"future_kl/weight_{name}": value for name, value in weights.items()}
    for sign in SIGNS:
        for side, share in {"upper": 0.02, "lower": 0.6}.items():
            values[f"future_kl/weight_clip_{sign}_{side}"] = min(1, share + 0.3 * broken + abs(noise(0, 0.01)))
        for q, z in zip(QUANTILES, (-3.1, -2.3, -1.6, 0, 1.6, 2.3, 3.1), strict=True):
            values[f"policy/ratio_{sign}_q{100 * q:g}"] = math.exp(z * 3 * shift)
    if step % 20 == 0:
        values |= {"noise/shift": 3e-6, "noise/future_kl": 9e-6, "noise/shift_ratio": 5e-5}
    if step == 7:
        values["policy/loss"] = None
    return values


def timing(step, collapse, draw):
    parts = {
        "sync": 0.02,
        "generate": 0.8,
        "reward": 0.1,
        "log_probs": 0.15,
        "update": 0.3,
        "idle": 0.02,
        "observe": 0.01,
    }
    parts |= {"evaluate": 1.2} if step % 10 == 0 else {}
    parts = {name: seconds * math.exp(draw.gauss(0, 0.1)) for name, seconds in parts.items()}
    parts["step"] = sum(parts.values()) - parts["reward"]
    rates = {"generated_tokens_per_second": 4000.0, "trained_tokens_per_second": 9000.0, "tokens_per_second": 3000.0}
    return {f"time/{name}": round(seconds, 4) for name, seconds in parts.items()} | {
        f"throughput/{name}": rate * math.exp(draw.gauss(0, 0.05)) for name, rate in rates.items()
    }


def evaluation(step, collapse, data_sets, draw):
    values = {}
    for name in data_sets:
        avg = min(1, max(0, health(step, collapse)[0] + draw.gauss(0, 0.01)))
        for kind, value in {"avg": avg, "cons": avg * 1.02, "pass": min(1, avg * 1.1)}.items():
            ends = {"": value, "_low": max(0, value - 0.04), "_high": min(1, value + 0.04)}
            values |= {f"evaluation/{name}/{kind}{end}": min(1, number) for end, number in ends.items()}
        values[f"evaluation/{name}/response_tokens"] = 30.0
    mean = sum(values[f"evaluation/{name}/avg"] for name in data_sets) / len(data_sets)
    return values | {"evaluation/accuracy": mean, "evaluation/response_tokens": 30.0}


def trajectory(step, sample, collapse, draw, tokens):
    good, broken = health(step, collapse)
    right = draw.random() < good
    a, b = draw.randrange(100), draw.randrange(100)
    text = [str(a), " +", " ", str(b), ":\n"]
    for _ in range(draw.randrange(1, 6)):
        text += ["Let", " me", " add", " the", " ones", ":", " ", str(a % 10), " and", " ", str(b % 10), " make", " "]
        text += [str(a % 10 + b % 10), ".", " Wait", ",", " I", " check", " that", " again", ".\n"]
    text += ["So", " the", " last", " digit", " is", " **", str((a + b) % 10 if right else (a + b + 3) % 10), "**", "."]
    text.append("<eos>")
    if sample == 3:
        text = [HOSTILE, *text]
    n = len(text)
    row = {
        "step": step,
        "prompt_id": str(1000 + step),
        "sample": sample,
        "data_source": "sums",
        "prompt": f"What is the last digit of {a} + {b}? {HOSTILE if sample == 3 else ''}",
        "response": "".join(text),
        "ground_truth": str((a + b) % 10),
        "reward": 1.0 if right else -1.0,
        "accuracy": int(right),
        "advantage": round(draw.gauss(0.5 if right else -0.5, 0.3), 4),
        "finish_reason": "stop",
        "response_tokens": n,
        "versions": [[step, n - 5], [step + 1, 5]],
        "mini_batch": sample,
    }
    if tokens and sample != 1:
        shift = [draw.gauss(0, 0.02 * (1 + 6 * broken)) for _ in text]
        future = [sum(d * 0.978**k for k, d in enumerate(shift[i:])) for i in range(n)]
        old = [-abs(draw.gauss(0, 0.6)) for _ in text]
        row["tokens"] = {
            "text": text,
            "behaviour_log_prob": [value + draw.gauss(0, 1e-3) for value in old],
            "old_log_prob": old,
            "shift": shift,
            "future_kl": future,
            "weight": [min(1.2, max(0.8, math.exp(value))) for value in future],
            "entropy": [abs(draw.gauss(0, 0.4)) for _ in text],
        }
    return row
