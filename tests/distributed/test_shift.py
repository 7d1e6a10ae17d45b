"""Divergences under every kind of parallelism equal float64 sums over the logits of transformers."""

import json
import math

import numpy as np
import pytest
import torch

from fipo_megatron.compare.divergences import QUANTITIES
from tests.actor.models import random_model
from tests.distributed.launch import on_ranks
from tests.distributed.shift_worker import LAYOUTS, TOP_K
from tests.processes import run_ranks

VOCAB = 700
LENGTHS = [(5, 90), (17, 33), (2, 61), (9, 1), (30, 70), (1, 24), (12, 48), (3, 7)] * 4
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two models of different families and sizes, responses, and the expected numbers of each response."""
    directory = tmp_path_factory.mktemp("pair")
    models = {
        "base": random_model("qwen2", 1, vocab_size=VOCAB),
        "rl": random_model("llama3", 2, vocab_size=VOCAB, hidden_size=48, intermediate_size=64),
    }
    for name, model in models.items():
        with torch.no_grad():  # logits of about one nat, whose rounding in float32 is below the bound
            for parameter in model.parameters():
                parameter.mul_(0.4 if parameter.ndim > 1 else 1)
        model.save_pretrained(directory / name)
    rng = np.random.default_rng(3)
    rows, expected = [], []
    for number, (prompt, response) in enumerate(LENGTHS):
        prompt_ids, ids = rng.integers(0, VOCAB, prompt), rng.integers(0, VOCAB, response)
        rows.append({"prompt_id": str(number), "prompt_ids": prompt_ids.tolist(), "response_ids": ids.tolist()})
        tokens = torch.from_numpy(np.concatenate([prompt_ids, ids]))
        with torch.no_grad():
            logits = [
                model.double()(tokens[None], use_cache=False).logits[0, prompt - 1 : -1] / 0.8
                for model in models.values()
            ]
        expected.append(by_definition(*logits, torch.from_numpy(ids)))
    (directory / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory, expected


def by_definition(base, rl, labels):
    """Returns the quantities ``[K, R]`` from logits ``[R, V]`` in float64."""
    log_q, log_p = (logits.double().log_softmax(-1) for logits in (base, rl))
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    label = [log.gather(1, labels[:, None])[:, 0] for log in (log_q, log_p)]
    top = [log.topk(TOP_K).indices for log in (log_q, log_p)]
    first = [each[:, 0] for each in top]
    overlap = [len(set(a) & set(b)) / TOP_K for a, b in zip(top[0].tolist(), top[1].tolist(), strict=True)]
    rank = (log_q > log_q.gather(1, first[1][:, None])).sum(1) + 1
    values = {
        "log_prob_base": label[0],
        "log_prob_rl": label[1],
        "delta": label[1] - label[0],
        "js": ((p * (log_p - log_m)).sum(1) + (q * (log_q - log_m)).sum(1)) / 2,
        "kl": (p * (log_p - log_q)).sum(1),
        "kl_reverse": (q * (log_q - log_p)).sum(1),
        "entropy_base": -(q * log_q).sum(1),
        "entropy_rl": -(p * log_p).sum(1),
        "rank": rank,
        "overlap": torch.tensor(overlap),
        "choice_base": first[0],
        "choice_rl": first[1],
    }
    return torch.stack([values[name].double() for name in QUANTITIES]).numpy()


@pytest.mark.parametrize("ranks", list(LAYOUTS))
def test_every_layout_equals_the_definitions(case, ranks):
    directory, expected = case
    (directory / "ranks.json").write_text(str(ranks))
    if ranks > 1:
        on_ranks("tests.distributed.shift_worker", ranks, str(directory))
    else:
        done = run_ranks("tests.distributed.shift_worker", str(directory), ranks=None)
        assert done.code == 0, done.output[-6000:]
    for name in LAYOUTS[ranks]:
        with np.load(directory / f"{name}.npz") as found:
            assert len(found) == len(expected)
            for number, wanted in enumerate(expected):
                difference = np.abs(found[str(number)] - wanted).max(axis=1)
                assert (difference < 1e-6).all(), (name, number, dict(zip(QUANTITIES, difference, strict=True)))
    assert max(wanted[QUANTITIES.index("js")].max() for wanted in expected) <= math.log(2)
