"""The plan holds its invariants for any lengths, and packed arrays obey the position convention."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.config import ParallelConfig
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import (
    TOKENS,
    MiniBatch,
    SequenceCost,
    imbalance,
    pack,
    plan_micro_batches,
    split_mini_batches,
)
from fipo_megatron.data.trajectory import Prompt, Trajectory


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    dp=st.integers(1, 8),
    budget=st.integers(100, 400),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 1000),
    quadratic=st.sampled_from([0, 1, 1000]),
)
def test_every_trajectory_once_under_budget_and_equal_counts(lengths, dp, budget, multiple, seed, quadratic):
    mini_batches = [
        list(map(int, part)) for part in np.array_split(np.random.default_rng(seed).permutation(len(lengths)), 2)
    ]
    mini_batches = [part for part in mini_batches if part]
    plan = plan_micro_batches(
        lengths,
        mini_batches,
        token_budget=budget,
        data_parallel_size=dp,
        micro_batch_multiple=multiple,
        cost=SequenceCost(1, quadratic),
    )
    assert len(plan) == len(mini_batches)
    for members, mini_batch in zip(mini_batches, plan, strict=True):
        assert len(mini_batch.micro_batches) == dp
        counts = {len(rank) for rank in mini_batch.micro_batches}
        assert len(counts) == 1
        assert counts.pop() % multiple == 0
        placed = [i for rank in mini_batch.micro_batches for micro_batch in rank for i in micro_batch]
        assert sorted(placed) == sorted(members)
        assert all(sum(lengths[i] for i in mb) <= budget for rank in mini_batch.micro_batches for mb in rank)


def test_balance_over_ranks():
    """The loads of the ranks differ by less than 200 tokens in every round."""
    rng = np.random.default_rng(1)
    lengths = [int(x) for x in rng.lognormal(6, 0.7, 512).clip(32, 4000)]
    (mini_batch,) = plan_micro_batches(lengths, [range(512)], token_budget=8192, data_parallel_size=8)
    for concurrent in zip(*mini_batch.micro_batches, strict=True):
        loads = [sum(lengths[i] for i in micro_batch) for micro_batch in concurrent]
        assert max(loads) - min(loads) < 200
        assert min(loads) > 7000


@pytest.mark.parametrize(("limit", "budget", "idle"), [(20_000, 32_768, 0.001), (65_536, 131_072, 0.01)])
def test_balance_by_cost(limit, budget, idle):
    """Ranks and the micro-batches of a round cost the same; their tokens differ, since attention grows with L²."""
    lengths = [int(x) for x in np.random.default_rng(1).lognormal(np.log(limit / 5), 0.8, 512).clip(32, limit)]
    cost = SequenceCost(64_000, 1)  # FLOPs of Qwen2.5-32B, divided by 655,360
    (plan,) = plan_micro_batches(lengths, [range(512)], token_budget=budget, data_parallel_size=8, cost=cost)
    (by_tokens,) = plan_micro_batches(lengths, [range(512)], token_budget=budget, data_parallel_size=8)
    assert len(plan.micro_batches[0]) <= len(by_tokens.micro_batches[0])
    assert imbalance([plan], lengths, cost) <= 1 + idle < imbalance([by_tokens], lengths, cost)
    assert imbalance([plan], lengths, cost, lockstep=8) <= 1 + 4 * idle
    assert imbalance([by_tokens], lengths, cost, lockstep=8) > 1 + 8 * idle


def test_no_rank_always_has_the_most_expensive_micro_batch():
    (plan,) = plan_micro_batches([8, 7, 6, 5], [range(4)], token_budget=8, data_parallel_size=2)
    assert plan.micro_batches == (((0,), (3,)), ((1,), (2,)))
    assert imbalance([plan], [8, 7, 6, 5], TOKENS) == 1
    assert imbalance([plan], [8, 7, 6, 5], TOKENS, lockstep=2) == 14 / 13
    assert imbalance([plan, plan], [8, 7, 6, 5], SequenceCost(0, 1)) == 89 / 87
    pairs = [MiniBatch((((0,), (3,)), ((1,), (2,)), ((2,), (1,)), ((3,), (0,))))]  # each pair waits by itself
    assert imbalance(pairs, [8, 7, 6, 5], TOKENS, lockstep=2) == 14 / 13
    assert imbalance(pairs, [8, 7, 6, 5], TOKENS, lockstep=4) == 16 / 13


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ({}, 1),
        ({"tensor_parallel": 8}, 1),
        ({"expert_parallel": 8}, 8),
        ({"expert_parallel": 8, "tensor_parallel": 2}, 4),
        ({"expert_parallel": 4, "tensor_parallel": 2, "context_parallel": 4}, 1),
        ({"expert_parallel": 4, "expert_tensor_parallel": 2, "tensor_parallel": 2}, 4),
    ],
)
def test_ranks_that_share_experts(sizes, ranks):
    assert ParallelConfig(**sizes).data_ranks_in_lockstep == ranks


def test_equal_tokens_where_only_they_fit_the_budget():
    """By cost 5 + 3, 3 + 3 + 3 and nowhere for the last 2."""
    lengths = [5, 3, 3, 3, 2, 2, 2]
    (plan,) = plan_micro_batches(lengths, [range(7)], token_budget=10, cost=SequenceCost(1, 1))
    assert len(plan.micro_batches[0]) == 2


def test_fillers_make_up_the_number():
    (mini_batch,) = plan_micro_batches([10], [[0]], token_budget=16, data_parallel_size=2, micro_batch_multiple=2)
    assert mini_batch.micro_batches == (((0,), ()), ((), ()))


def test_mini_batches_hold_whole_groups_in_seeded_order():
    sizes = [3, 1, 2, 4, 2]
    groups = np.repeat(np.arange(5), sizes)
    split = split_mini_batches(sizes, 2, seed=5)
    assert sorted(itertools.chain(*split)) == list(range(12))
    assert [len({int(groups[i]) for i in part}) for part in split] == [2, 2, 1]
    whole = [sorted(int(groups[i]) for i in part) for part in split]
    assert all(part.count(group) == sizes[group] for part in whole for group in part)
    assert split == split_mini_batches(sizes, 2, seed=5)
    assert split != split_mini_batches(sizes, 2, seed=6)


def make(prompt, response, mask=None, **changes):
    n = len(response)
    return Trajectory(
        Prompt(f"p{prompt[0]}", np.array(prompt), ""),
        0,
        np.array(response),
        -np.arange(1, n + 1) / 10,
        np.ones(n) if mask is None else np.array(mask),
        **({"advantage": 0.5} | changes),
    )


def test_everything_lives_at_the_predicting_position():
    packed = pack([make([1, 2], [3, 4, 5], mask=[1, 0, 1]), make([6], [7], advantage=-2.0)], CpLayout(2))
    assert packed.cu_seqlens.tolist() == [0, 8, 12]
    assert packed.lengths.tolist() == [5, 2]
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0, 0]
    assert packed.labels.tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 7, 0, 0, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert packed.mask.astype(int).tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert packed.advantages.tolist() == [0, 0.5, 0, 0.5, 0, 0, 0, 0, -2.0, 0, 0, 0]
    assert packed.behaviour_log_probs.tolist() == pytest.approx([0, -0.1, -0.2, -0.3, 0, 0, 0, 0, -0.1, 0, 0, 0])
    part = packed.slice(CpLayout(2, 1))
    assert part.tokens.tolist() == [3, 4, 5, 0, 7, 0]
    assert part.labels.tolist() == [4, 5, 0, 0, 0, 0]
    assert part.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert part.cu_seqlens.tolist() == [0, 8, 12]


def test_truncated_responses_can_be_masked():
    cut = make([1], [2, 3], finish_reason="length")
    assert pack([cut], CpLayout()).mask.tolist() == [True, True, False]
    aborted = make([1], [2, 3], finish_reason="abort")
    assert pack([aborted], CpLayout(), mask_truncated=True).mask.tolist() == [True, True, False]
    masked = pack([cut], CpLayout(), mask_truncated=True)
    assert masked.mask.tolist() == [False, False, False]
    assert masked.advantages.tolist() == [0, 0, 0]


def test_only_the_end_of_a_micro_batch_is_padded_to_the_multiple():
    """Padding every sequence to 8 · 128 tokens per rank would add tokens to each, and not once per micro-batch."""
    packed = pack([make([1] * 10, [2] * 91), make([1] * 4, [2] * 6), make([1], [2] * 2)], CpLayout(4), multiple_of=1024)
    assert packed.cu_seqlens.tolist() == [0, 104, 120, 4096]
    assert packed.lengths.tolist() == [101, 10, 3]
    assert int(packed.mask.sum()) == 91 + 6 + 2
    assert packed.position_ids[-1] == 4096 - 120 - 1


def test_a_filler_is_one_masked_sequence():
    filler = pack([], CpLayout(4), multiple_of=2)
    assert filler.cu_seqlens.tolist() == [0, 8]
    assert not filler.mask.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plan_micro_batches([5, 20, 30], [[0, 1]], token_budget=16),
            "2 trajectories are longer than 16.*number 1 with 20",
        ),
        (lambda: plan_micro_batches([5], [[0], []], token_budget=16), "mini_batches: number 1 is empty"),
        (lambda: plan_micro_batches([5, 5], [[0], [0]], token_budget=16), "each index must occur once and be in 0 … 1"),
        (lambda: plan_micro_batches([5], [[-1]], token_budget=16), "each index must occur once and be in 0 … 0"),
        (lambda: plan_micro_batches([5], [[0]], token_budget=0), "must be >= 1, got 0, 1, 1"),
        (lambda: split_mini_batches([2], 0, seed=0), "groups_per_mini_batch: must be >= 1, got 0"),
        (lambda: pack([make([1], [2], advantage=None)], CpLayout()), "trajectory p1/0: advantage: missing"),
    ],
)
def test_wrong_calls_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
