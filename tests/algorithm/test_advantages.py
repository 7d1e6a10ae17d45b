"""Group-relative advantages, dynamic sampling and the overlong penalty, by hand and by property."""

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.algorithm.advantages import group_advantages, is_informative, overlong_penalty

groups_of_rewards = st.lists(st.lists(st.floats(-2, 2), min_size=2, max_size=9), min_size=1, max_size=6)


@given(groups=groups_of_rewards, seed=st.integers(0, 2**32 - 1))
def test_each_baseline_in_any_order(groups, seed):
    """Ids alone define the groups: the order of the responses does not matter."""
    rewards = [reward for group in groups for reward in group]
    ids = [17 * number - 5 for number, group in enumerate(groups) for _ in group]
    expected = {"group_normalised": [], "group_mean": [], "leave_one_out": []}
    for group in groups:
        mean, std = statistics.fmean(group), statistics.stdev(group)
        for i, reward in enumerate(group):
            expected["group_normalised"].append((reward - mean) / (std + 1e-6))
            expected["group_mean"].append(reward - mean)
            expected["leave_one_out"].append(reward - statistics.fmean(group[:i] + group[i + 1 :]))
    order = np.random.default_rng(seed).permutation(len(rewards))
    for baseline, want in expected.items():
        got = group_advantages(torch.tensor(rewards, dtype=torch.float64)[order], torch.tensor(ids)[order], baseline)
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx([want[i] for i in order], rel=1e-4, abs=1e-5)


def test_one_group_by_hand():
    got = group_advantages(torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.int64))
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_equal_rewards_have_no_advantage():
    for epsilon in (1e-6, 0.0):
        found = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), epsilon=epsilon)
        assert found.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rewards", "ids", "message"),
    [
        ([1.0, 2.0, 3.0], [0, 0, 7], r"groups \[7\] have one response"),
        ([1.0, float("nan")], [4, 4], r"response 1 \(group 4\) is nan"),
        ([1.0, float("inf")], [4, 4], r"response 1 \(group 4\) is inf"),
        ([1.0, 2.0], [0], r"expected \[N\] and integer \[N\]"),
        ([1.0, 2.0], [0.0, 0.0], r"expected \[N\] and integer \[N\]"),
    ],
)
def test_wrong_rewards_are_named(rewards, ids, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), torch.tensor(ids))


def test_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="got 'mean'"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), "mean")


@pytest.mark.parametrize(
    ("accuracies", "informative"),
    [([0, 1], True), ([1, 1, 0], True), ([1, 1], False), ([0, 0, 0], False), ([1], False), ([], False)],
)
def test_only_mixed_groups_are_informative(accuracies, informative):
    assert is_informative(accuracies) is informative


@pytest.mark.parametrize("wrong", [0.5, -1, 2])
def test_an_accuracy_is_0_or_1(wrong):
    with pytest.raises(ValueError, match=f"expected 0 or 1, got {wrong}"):
        is_informative([1, wrong])


def test_overlong_penalty_of_the_paper():
    """The 32B recipe has a limit of 20,480 tokens and a buffer of 4,096."""
    lengths = torch.tensor([1, 16384, 16385, 18432, 20480])
    got = overlong_penalty(lengths, 20480, 4096, 1.0)
    assert got.tolist() == pytest.approx([0.0, 0.0, -1 / 4096, -0.5, -1.0])
    assert overlong_penalty(lengths, 20480, 4096, 0.5).tolist() == pytest.approx([0.0, 0.0, -1 / 8192, -0.25, -0.5])
    assert overlong_penalty(lengths, 20480, 0).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="between 0 and max_length = 10 tokens, got 11"):
        overlong_penalty(lengths, 10, 11)
