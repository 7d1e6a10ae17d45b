"""Groups arrive as they were sent, and their arrays are views of the buffer that arrived."""

import numpy as np
import pytest

from fipo_megatron.data.trajectory import Group, Prompt, TokenSpan, Trajectory
from fipo_megatron.rollout.group_buffers import GroupBytes, read_groups


def response(prompt, sample, length, mask=None, **changes):
    rng = np.random.default_rng(sample)
    mask = np.ones(length, bool) if mask is None else mask
    return Trajectory(prompt, sample, rng.integers(0, 99, length), -rng.random(length), mask, **changes)


def groups():
    first, second = (Prompt(f"p{n}", np.arange(1, 3 + n), "42 °", "aime") for n in range(2))
    mixed = np.arange(7) % 2 == 0
    spans = (TokenSpan(0, 3), TokenSpan(2, 4))
    return [
        Group(first, (response(first, 0, 5, reward=1.0, accuracy=1, advantage=0.7), response(first, 3, 7, mixed))),
        Group(second, (response(second, 1, 4, np.zeros(4, bool), spans=spans, failure="timeout"),)),
    ]


def sent(found):
    content = GroupBytes.of(found)
    buffer = np.empty(content.size, np.uint8)
    content.write(buffer)
    return buffer


def described(group):
    values = ("name", "spans", "finish_reason", "reward", "accuracy", "advantage", "failure")
    responses = [
        [t.tokens.tolist(), t.behaviour_log_probs.tolist(), t.mask.tolist(), *(getattr(t, name) for name in values)]
        for t in group.trajectories
    ]
    return group.prompt.id, group.prompt.tokens.tolist(), group.prompt.ground_truth, group.prompt.data_source, responses


def test_groups_arrive_as_they_were_sent():
    assert list(map(described, read_groups(sent(groups())))) == list(map(described, groups()))
    assert read_groups(sent([])) == []


def test_arrays_are_read_only_views_of_the_buffer():
    buffer = sent(groups())
    for trajectory in (t for group in read_groups(buffer) for t in group.trajectories):
        assert np.shares_memory(trajectory.tokens, buffer)
        assert np.shares_memory(trajectory.behaviour_log_probs, buffer)
        with pytest.raises(ValueError, match="read-only"):
            trajectory.tokens[0] = 1


def test_a_mask_of_equal_values_takes_no_bytes():
    prompt = Prompt("p", np.array([1]), "")
    full, mixed = (
        GroupBytes.of([Group(prompt, (response(prompt, 0, 8000, mask),))]).size
        for mask in (np.ones(8000, bool), np.arange(8000) < 7999)
    )
    assert full < 8 * 8000 + 1000
    assert mixed - full == pytest.approx(8000, abs=32)
