"""Draft, score, cut on tables of probabilities: the length of drafts changes no response."""

import asyncio
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.data.trajectory import TokenSpan
from fipo_megatron.rollout.engine import Generation, GenerationRequest, SamplingParameters
from fipo_megatron.rollout.sglang.swapping_engine import SwappingEngine, second_seed

VOCAB, STOP = 6, 0
PROMPT = np.array([2, 3], np.int32)


@cache
def table(number, token):
    logits = np.random.default_rng([number, token]).normal(size=VOCAB)
    logits[STOP] -= 1.5  # responses of several tokens
    return logits - np.log(np.exp(logits).sum())


@dataclass
class Table:
    """Draws each token after the last one; like SGLang's deterministic inference, by seed and position."""

    number: int
    calls: list = field(default_factory=list)

    def log_probs_after(self, token):
        return table(self.number, int(token))

    def next(self, tokens, seed):
        noise = np.random.default_rng([seed, len(tokens)]).gumbel(size=VOCAB)
        log_probs = self.log_probs_after(tokens[-1])
        token = int(np.argmax(log_probs + noise))
        return token, log_probs[token]

    async def generate(self, request):
        self.calls.append((len(request.tokens), request.sampling.max_tokens))
        tokens, log_probs = request.tokens.tolist(), []
        while len(log_probs) < request.sampling.max_tokens and (not log_probs or tokens[-1] != STOP):
            token, log_prob = self.next(tokens, request.seed)
            tokens.append(token)
            log_probs.append(log_prob)
        found = np.array(tokens[len(request.tokens) :], np.int32)
        reason = "stop" if found[-1] == STOP else "length"
        return Generation(found, np.array(log_probs, np.float32), (TokenSpan(0, 4),), reason)

    async def log_probs(self, request_id, group, tokens, start):
        rows = [self.log_probs_after(tokens[i - 1])[tokens[i]] for i in range(start, len(tokens))]
        return np.array(rows, np.float32)


def request(seed, max_tokens):
    return GenerationRequest("a", "a", PROMPT, SamplingParameters(1.0, max_tokens, stop_token_ids=(STOP,)), seed)


def sampled(threshold, draft_tokens, seed=0, max_tokens=12):
    engine = SwappingEngine(Table(1), Table(2), draft_tokens, threshold)
    return engine, asyncio.run(engine.generate(request(seed, max_tokens)))


def one_by_one(threshold, seed, second_seed, max_tokens):
    """Draws each token in turn: the primary model, and the second one where Δ is below the threshold."""
    primary, second, tokens, rows = Table(1), Table(2), PROMPT.tolist(), []
    while len(rows) < max_tokens and (not rows or tokens[-1] != STOP):
        own, log_prob = primary.next(tokens, seed)
        delta = float(np.float32(second.log_probs_after(tokens[-1])[own])) - float(np.float32(log_prob))
        selected = threshold is not None and delta < threshold
        token, log_prob = second.next(tokens, second_seed) if selected else (own, log_prob)
        rows.append((token, np.float32(log_prob), selected, token != own, delta))
        tokens.append(token)
    return rows


@given(
    st.one_of(st.none(), st.floats(-2, 1)),
    st.integers(1, 9),
    st.integers(0, 2**62),
    st.integers(1, 20),
)
def test_drafts_of_every_length_give_the_response_of_single_tokens(threshold, draft_tokens, seed, max_tokens):
    engine, found = sampled(threshold, draft_tokens, seed, max_tokens)
    rows = one_by_one(threshold, seed, second_seed(seed), max_tokens)
    columns = [list(column) for column in zip(*rows, strict=True)]
    arrays = (found.tokens, found.log_probs, found.selected, found.changed, found.quantities[:, 0])
    assert [array.tolist() for array in arrays] == columns
    assert found.quantities.shape == (len(rows), 1)
    assert found.finish_reason == ("stop" if found.tokens[-1] == STOP else "length")
    assert found.spans == (TokenSpan(0, 4),)
    assert all(length <= (max_tokens if threshold is None else draft_tokens) for _, length in engine.primary.calls)


def test_the_second_models_draws_are_independent_of_the_draft():
    """With one seed for both, the second model would often draw the token that was replaced."""
    engine = SwappingEngine(Table(1), Table(2), 1, -1.0)

    async def all_of():
        return [await engine.generate(request(seed, 1)) for seed in range(6000)]

    found = asyncio.run(all_of())
    primary, second = (np.exp(Table(number).log_probs_after(PROMPT[-1])) for number in (1, 2))
    left = np.where(np.log(second / primary) >= -1, primary, 0)
    wanted = left + (1 - left.sum()) * second
    assert 0.2 < left.sum() < 0.8
    frequencies = np.bincount([one.tokens[0] for one in found], minlength=VOCAB) / len(found)
    np.testing.assert_array_less(np.abs(frequencies - wanted), 5 * np.sqrt(wanted * (1 - wanted) / len(found)))


def test_a_draft_is_cut_as_often_as_needed():
    for seed in range(20):
        engine, found = sampled(np.inf, 50, seed, 8)
        assert found.selected.all()
        assert engine.primary.calls == [(len(PROMPT) + n, 8 - n) for n in range(len(found.tokens))]
        assert [length for _, length in engine.second.calls] == [1] * len(found.tokens)


def test_a_draft_that_is_aborted_before_its_first_token_ends_the_response():
    class Aborted(Table):
        async def generate(self, request):
            if len(request.tokens) > len(PROMPT):
                return Generation(np.empty(0, np.int32), np.empty(0, np.float32), (), "abort")
            return await super().generate(request)

    engine = SwappingEngine(Aborted(1), Table(2), 3, -np.inf)
    found = next(
        one for seed in range(20) if (one := asyncio.run(engine.generate(request(seed, 12)))).finish_reason != "stop"
    )
    assert found.finish_reason == "abort"
    assert len(found.tokens) == len(found.selected) == len(found.quantities) == 3
