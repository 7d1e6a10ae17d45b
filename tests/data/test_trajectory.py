"""Trajectories are checked when they enter the trainer; the error names the trajectory, the field and the value."""

from dataclasses import replace

import numpy as np
import pytest

from fipo_megatron.config import AlgorithmConfig
from fipo_megatron.data.batch import compute_advantages
from fipo_megatron.data.trajectory import Group, Prompt, Score, TokenSpan, Trajectory

PROMPT = Prompt("aime-7", np.array([5, 6]), "42")


def make(prompt=PROMPT, **changes):
    values = {
        "sample": 3,
        "tokens": np.array([1, 2, 3]),
        "behaviour_log_probs": np.array([-0.1, -0.2, -0.3]),
        "mask": np.array([1, 0, 1]),
    }
    return Trajectory(prompt, **(values | changes))


def test_arrays_take_their_compact_types():
    trajectory = make()
    assert (trajectory.tokens.dtype, trajectory.prompt.tokens.dtype) == (np.int32, np.int32)
    assert trajectory.behaviour_log_probs.dtype == np.float32
    assert trajectory.mask.tolist() == [True, False, True]
    assert (len(trajectory), trajectory.name) == (5, "aime-7/3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.array([], dtype=np.int32)}, "tokens: is empty"),
        ({"tokens": np.array([1.0, 2.0, 3.0])}, "tokens: expected integer token ids, got float64"),
        ({"tokens": np.array([1, -2, 3])}, "tokens: token ids must be >= 0, got -2 .. 3"),
        ({"tokens": np.array([[1, 2, 3]])}, r"tokens: expected shape \[R\], got \[1, 3\]"),
        ({"behaviour_log_probs": np.zeros(2)}, r"behaviour_log_probs: expected shape \[3\].*got \[2\]"),
        ({"behaviour_log_probs": np.zeros(3, int)}, "behaviour_log_probs: expected floating point, got int64"),
        (
            {"behaviour_log_probs": np.array([0, np.nan, 0])},
            "behaviour_log_probs: must be finite in float32, got nan at token 1",
        ),
        (
            {"behaviour_log_probs": np.array([0, 0, -np.inf])},
            "behaviour_log_probs: must be finite in float32, got -inf at token 2",
        ),
        ({"behaviour_log_probs": np.array([0, 0.5, 0])}, "behaviour_log_probs: must be <= 0, got 0.5 at token 1"),
        ({"behaviour_log_probs": np.array([0, 0, -1e300])}, "behaviour_log_probs: must be finite in float32, got -1e"),
        ({"finish_reason": "Length"}, "finish_reason: must be one of stop, length, abort, got 'Length'"),
        ({"reward": "1.0"}, "reward: must be a finite number, got '1.0'"),
        ({"mask": np.array([1, 2, 0])}, "mask: must be 0 or 1, got 2 at token 1"),
        ({"mask": np.array([1.0, 0.5, 0])}, "mask: must be 0 or 1, got 0.5 at token 1"),
        ({"mask": np.array([True])}, r"mask: expected shape \[3\].*got \[1\]"),
        ({"spans": ()}, "spans: must start at 0"),
        ({"spans": (TokenSpan(0, 1), TokenSpan(3, 2))}, r"spans: .*within 3 tokens, got \[0, 3\]"),
        ({"spans": (TokenSpan(0, 1), TokenSpan(0, 2))}, "spans: must start at 0 and increase"),
        ({"reward": float("nan")}, "reward: must be a finite number, got nan"),
        ({"advantage": float("inf")}, "advantage: must be a finite number, got inf"),
        ({"accuracy": 2}, "accuracy: must be 0 or 1, got 2"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^trajectory aime-7/3: {message}"):
        make(**changes)


def test_rounding_above_zero_is_cut_off_and_the_arrays_are_frozen_copies():
    given = np.array([1e-6, -0.5, -1.0])
    trajectory = make(behaviour_log_probs=given)
    given[:] = 7.0
    assert trajectory.behaviour_log_probs.tolist() == [0.0, -0.5, -1.0]
    for array in (trajectory.tokens, trajectory.mask, trajectory.behaviour_log_probs, trajectory.prompt.tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_arrays_that_cannot_change_are_not_copied():
    first = make(behaviour_log_probs=np.array([0, -0.5, -1.0]))
    scored = first.with_score(Score(1.0, 1))
    final = scored.with_advantage(0.5)
    (by_group,) = compute_advantages(
        [Group(PROMPT, (scored, replace(scored, sample=4, reward=-1.0)))], AlgorithmConfig()
    )
    for other in (scored, final, by_group.trajectories[0]):
        for name in ("tokens", "behaviour_log_probs", "mask"):
            assert np.shares_memory(getattr(first, name), getattr(other, name)), name
    assert (final.reward, final.advantage, first.advantage) == (1.0, 0.5, None)
    with pytest.raises(ValueError, match=r"^trajectory aime-7/3: advantage: must be a finite number, got nan"):
        scored.with_advantage(float("nan"))


def test_a_score_is_checked_and_masks_a_response_without_a_reward():
    first = make()
    masked = first.with_score(Score(None, None, "timeout", "late"))
    assert (masked.reward, masked.accuracy, masked.failure) == (None, None, "timeout")
    assert not masked.mask.any()
    assert first.mask.any()
    assert not masked.mask.flags.writeable
    for score, message in (
        (Score(float("inf"), 1), "reward: must be a finite"),
        (Score(1.0, 3), "accuracy: must be 0"),
    ):
        with pytest.raises(ValueError, match=f"^trajectory aime-7/3: {message}"):
            first.with_score(score)


def test_bad_prompts_and_groups_are_named():
    with pytest.raises(ValueError, match=r"^prompt 'x': tokens: is empty"):
        Prompt("x", np.array([], dtype=np.int32), "")
    with pytest.raises(ValueError, match=r"group 'aime-7': holds responses to another prompt"):
        Group(PROMPT, (make(Prompt("other", np.array([1]), "")),))
    with pytest.raises(ValueError, match=r"group 'aime-7': sample numbers must increase, got \[3, 3\]"):
        Group(PROMPT, (make(), make()))
