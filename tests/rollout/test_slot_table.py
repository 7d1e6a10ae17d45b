"""The table of responses in progress against lists, under random beginnings, moves and ends."""

import numpy as np
import pytest

from fipo_megatron.data.trajectory import TokenSpan
from fipo_megatron.rollout.embedded.drawing import Drawn
from fipo_megatron.rollout.embedded.slot_table import SlotTable
from fipo_megatron.rollout.engine import GenerationRequest, SamplingParameters

SLOTS, STOPS = 6, ((3,), (3, 5), ())


class Expected:
    """One response as lists, one token at a time."""

    def __init__(self, request, streams):
        self.request, self.columns, self.quantities, self.versions = request, [], [], []
        seeds = [np.random.SeedSequence(request.seed), np.random.SeedSequence(request.seed, spawn_key=(1,))]
        self.random = [np.random.Generator(np.random.Philox(seed)) for seed in seeds[:streams]]

    def reason(self):
        if self.columns[-1][0] in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.columns) == self.request.sampling.max_tokens else None

    def spans(self):
        starts = [i for i, one in enumerate(self.versions) if i == 0 or one != self.versions[i - 1]]
        return tuple(TokenSpan(start, self.versions[start]) for start in starts)


def check_end(generation, expected, reason):
    tokens, log_probs, selected, changed = zip(*expected.columns, strict=True) if expected.columns else [()] * 4
    assert generation.tokens.tolist() == list(tokens)
    assert generation.tokens.dtype == np.int32
    assert np.array_equal(generation.log_probs, np.array(log_probs, np.float32))
    assert generation.selected.tolist() == list(selected)
    assert generation.changed.tolist() == list(changed)
    assert generation.spans == expected.spans()
    assert generation.finish_reason == reason
    assert (generation.quantities is None) == (not expected.quantities)
    if expected.quantities:
        assert np.array_equal(generation.quantities, np.stack(expected.quantities))


@pytest.mark.parametrize("seed", range(6))
def test_the_table_equals_lists(seed):
    random, streams = np.random.default_rng(seed), 1 + seed % 2
    table, running, ended, version = SlotTable(SLOTS, streams), {}, 0, 0
    while ended < 40:
        version += random.random() < 0.05
        for slot in range(SLOTS):
            if slot not in running and random.random() < 0.5:
                how = SamplingParameters(
                    1 + random.random(), int(random.choice([1, 3, 200])), 0.9, STOPS[random.integers(3)]
                )
                prompt = random.integers(0, 9, random.integers(1, 5)).astype(np.int32)
                request = GenerationRequest("a", "a", prompt, how, int(random.integers(1 << 40)))
                table.begin(slot, request)
                running[slot] = Expected(request, streams)
        if running and len(running) < SLOTS and random.random() < 0.2:
            old = int(random.choice(list(running)))
            new = next(slot for slot in range(SLOTS) if slot not in running)
            table.move({old: new})
            running[new] = running.pop(old)
        slots = table.running
        assert slots.tolist() == sorted(running)
        if not running:
            continue
        how = table.draw(slots, (0.5,))
        assert how.uniform.T.tolist() == [[one.random() for one in running[slot].random] for slot in slots]
        assert how.temperatures[:, 0].tolist() == [running[slot].request.sampling.temperature for slot in slots]
        drawn = Drawn(
            np.where(random.random(len(slots)) < 0.02, 3, random.choice([1, 2, 5], len(slots), p=[0.6, 0.39, 0.01])),
            random.normal(size=len(slots)),
            random.random(len(slots)) < 0.5,
            random.random(len(slots)) < 0.5,
            random.normal(size=(len(slots), 2)) if seed % 3 else None,
        )
        reasons = table.append(slots, drawn, version)
        for index, slot in enumerate(slots.tolist()):
            one = running[slot]
            columns = (drawn.tokens, drawn.log_probs, drawn.selected, drawn.changed)
            one.columns.append([column[index] for column in columns])
            one.versions.append(version)
            if drawn.quantities is not None:
                one.quantities.append(drawn.quantities[index])
        assert reasons == [(slot, reason) for slot in slots.tolist() if (reason := running[slot].reason())]
        if random.random() < 0.05 and not reasons:
            reasons = [(int(slots[0]), "abort")]
        for slot, reason in reasons:
            whole = np.concatenate([running[slot].request.tokens, [one[0] for one in running[slot].columns]])
            assert table.all_tokens(slot).tolist() == whole.tolist()
            token, position = table.last(np.array([slot]))
            assert (token[0], position[0]) == (whole[-1], len(whole) - 1)
            assert table.longest(np.array([slot])) == len(whole)
            check_end(table.take(slot, reason), running.pop(slot), reason)
            ended += 1
