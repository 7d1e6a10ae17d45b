"""Partition invariance: the gradient of a mini-batch does not depend on the split of the work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.algorithm.policy_loss_config import loss_config
from tests.algorithm.partitions import PACKAGE, assert_split_matches, random_batch

# A small ratio bound, so that some responses have dual-clipped tokens and some of those are dropped.
CONFIGS = {
    "release, unclipped weights": loss_config("fipo", dual_clip=3.0, safety_threshold=2.0, weight_clip=None),
    "paper": loss_config(
        "fipo",
        dual_clip=3.0,
        safety_threshold=2.0,
        safety_rule="paper",
        sequence_drop=False,
        shift_clamp=math.inf,
        weight_clip=(0.8, 1.2),
    ),
    "no decay, no filter": loss_config("fipo", half_life=math.inf, future_kl_filter=False, weight_clip=(0.5, 2.0)),
    "clamped shifts": loss_config("fipo", dual_clip=3.0, shift_clamp=0.4, weight_clip=None),
    "kl k1, drop at the first": loss_config(
        "fipo", dual_clip=3.0, sequence_drop_threshold=0, kl_coef=0.1, kl_estimator="k1"
    ),
    "kl k2, truncated importance sampling": loss_config("fipo", kl_coef=0.1, kl_estimator="k2", importance_cap=1.5),
    "dapo": loss_config("dapo", dual_clip=3.0),
    "grpo": loss_config("grpo"),
    "sequence mean with drops": loss_config("fipo", aggregation="sequence_mean", dual_clip=3.0, weight_clip=None),
}


@pytest.mark.parametrize("name", CONFIGS)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 8),
    dp=st.integers(1, 4),
    cp=st.sampled_from([1, 2, 4, 8]),
    budget=st.sampled_from([112, 160, 10_000]),
    multiple_of=st.sampled_from([1, 3]),
)
def test_any_split_has_the_gradient_of_the_loop(name, seed, size, dp, cp, budget, multiple_of):
    batch = random_batch(seed, size)
    assert_split_matches(PACKAGE, batch, CONFIGS[name], dp=dp, cp=cp, budget=budget, multiple_of=multiple_of, seed=seed)


def test_drops_occur_and_change_the_denominator():
    dropped = [
        assert_split_matches(PACKAGE, random_batch(seed), CONFIGS["release, unclipped weights"], cp=4, dp=2)
        for seed in range(10)
    ]
    assert 0 < sum(dropped) < 60
    assert any(0 < d < 6 for d in dropped)
