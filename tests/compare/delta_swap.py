"""Checks the distribution of responses whose tokens are replaced by Δ against its closed form, for any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fipo_megatron.rollout.engine import Generation, GenerationRequest, SamplingParameters, sampling_seed
from tests.sglang import models

THRESHOLD = -1.0
PROMPT = np.arange(2, 14, dtype=np.int32)
STOPS = (1, *range(20, 80))
"""The model's own stop token, and others: about every sixth token ends a response."""
SEEDS = 0, 7
"""Seeds of :func:`tests.sglang.models.model`: the primary and the second model."""
FALSE_ALARM = 1e-9
"""p-value below which a distribution counts as wrong."""


@dataclass(frozen=True)
class ClosedForm:
    """Distributions of the first two tokens of a response, by enumeration over all first tokens in float64.

    Attributes:
        first: ``[V]``, the first token.
        selected: Probability that the first token is replaced.
        second: ``[V + 1]``, the second token; the last entry: the response has ended with the first one.
        behind: ``[V + 1]``, the second token if the first one was replaced.
        wrong: ``[4, V]``, what the first token is not: the primary model's, the second model's, the primary model's
            without replacements, or that with Δ of the other sign.
    """

    first: np.ndarray
    selected: float
    second: np.ndarray
    behind: np.ndarray
    wrong: np.ndarray


def closed_form() -> ClosedForm:
    """Returns the closed form for :data:`PROMPT`, :data:`STOPS` and :data:`THRESHOLD`."""
    pair = [models.model(seed=seed) for seed in SEEDS]
    primary, second = (np.exp(_next_log_probs(model, PROMPT[None]))[0] for model in pair)
    tokens = np.arange(models.VOCAB, dtype=np.int32)[:, None]
    sequences = np.concatenate([np.tile(PROMPT, (models.VOCAB, 1)), tokens], axis=1)
    after = [np.exp(_next_log_probs(model, sequences)) for model in pair]
    behind = np.concatenate([_replaced(*after), np.zeros((models.VOCAB, 1))], axis=1)
    behind[list(STOPS)] = np.eye(models.VOCAB + 1)[-1]
    first, stays = _replaced(primary, second), np.log(second / primary) >= THRESHOLD
    left = primary * stays
    wrong = np.stack([primary, second, left / left.sum(), primary * ~stays + left.sum() * second])
    return ClosedForm(first, 1 - left.sum(), first @ behind, second @ behind, wrong)


def requests(count: int, max_tokens: int = 2) -> list[GenerationRequest]:
    """Returns requests for responses to the prompt, with different seeds."""
    sampling = SamplingParameters(1.0, max_tokens, stop_token_ids=STOPS)
    return [
        GenerationRequest(str(n), f"group {n % 8}", PROMPT, sampling, sampling_seed(3, "swap", n, 0))
        for n in range(count)
    ]


def check_distribution(found: Sequence[Generation]) -> None:
    """Checks the first token, the second one, and the one behind a replaced token, in responses to :func:`requests`."""
    form = closed_form()
    first = np.array([one.tokens[0] for one in found])
    second = np.array([one.tokens[1] if len(one.tokens) > 1 else models.VOCAB for one in found])
    replaced = np.array([one.selected[0] for one in found])
    ended = np.isin(first, STOPS)
    assert [one.finish_reason == "stop" for one in found] == (ended | np.isin(second, STOPS)).tolist()
    for tokens, distribution in ((first, form.first), (second, form.second), (second[replaced], form.behind)):
        assert _p_value(tokens, distribution) > FALSE_ALARM
    assert _p_value(replaced, np.array([1 - form.selected, form.selected])) > FALSE_ALARM
    stops = form.first[list(STOPS)].sum()
    assert _p_value(ended, np.array([1 - stops, stops])) > FALSE_ALARM
    for distribution in form.wrong:
        assert _p_value(first, distribution) < FALSE_ALARM, "the check cannot tell a wrong distribution"


def check_selected(found: Sequence[Generation], asked: Sequence[GenerationRequest]) -> None:
    """Checks the number of replaced tokens in responses against the sum of P_primary(Δ < τ) over their positions."""
    chances = []
    for one, response in zip(asked, found, strict=True):
        sequence = np.concatenate([one.tokens, response.tokens])
        with torch.no_grad():
            logits = [models.model(seed=seed)(torch.from_numpy(sequence[None]).long()).logits[0] for seed in SEEDS]
        primary, second = (torch.softmax(each[len(one.tokens) - 1 : -1].double(), -1) for each in logits)
        chances.append(torch.where(torch.log(second / primary) < THRESHOLD, primary, 0).sum(-1).numpy())
    chance = np.concatenate(chances)
    selected = sum(int(response.selected.sum()) for response in found)
    assert abs(selected - chance.sum()) < 6 * np.sqrt((chance * (1 - chance)).sum())


def _next_log_probs(model: torch.nn.Module, sequences: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(sequences).long()).logits[:, -1].double()
    return torch.log_softmax(logits, -1).numpy()


def _replaced(primary: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns π_primary(y)·1[Δ(y) ≥ τ] + P_primary(Δ < τ)·π_second(y) along the last axis."""
    left = np.where(np.log(second / primary) >= THRESHOLD, primary, 0.0)
    return left + (1 - left.sum(-1, keepdims=True)) * second


def _p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns the p-value of Pearson's χ² test; rare tokens are counted together, so that about ten are expected."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), len(tokens) * probabilities
    order = np.argsort(-expected)
    groups = np.minimum(np.cumsum(expected[order]) // 10, len(tokens) // 10 - 1)
    groups = np.unique(groups, return_inverse=True)[1]
    seen, wanted = (np.bincount(groups, each[order]) for each in (counts, expected))
    square = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2), torch.tensor(square / 2)))
