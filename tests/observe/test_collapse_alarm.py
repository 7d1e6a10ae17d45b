"""The alarm is raised for the signature of Fig. 2, not for a part of it, and in a resumed run in the same step."""

from dataclasses import replace

import pytest

from fipo_megatron.config import HealthConfig
from fipo_megatron.observe.collapse_alarm import LOOKED_AT, CollapseAlarm

CONFIG = HealthConfig(window=3, low_clip=0.02, policy_kl=0.01, length_ratio=0.75, policy_kl_limit=0.1)
HEALTHY, COLLAPSED = (0.002, 0.001, 100.0, 0.6), (0.05, 0.03, 40.0, 0.6)
WRONG = (0.05, 0.03, 100.0, 0.3)


def look(alarm, steps, first=0):
    found = []
    for number, values in enumerate(steps, first):
        _, raised = alarm.look(number, dict(zip(LOOKED_AT, values, strict=True)))
        found.append(raised)
    return found


def test_accuracy_that_falls_is_a_sign_like_length():
    assert look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [WRONG] * 2)[-1].step == 6
    assert not any(look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [(0.002, 0.03, 40.0, 0.1)] * 9))


def test_the_whole_signature_raises_it():
    found = look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [COLLAPSED] * 2)
    assert [bool(one) for one in found] == [False] * 6 + [True]
    assert (found[-1].step, found[-1].began) == (6, 4)
    assert "low-clip fraction 5.00% (limit 2.00%)" in found[-1].reason
    assert "length 40% of its best in 100 steps (limit 75%)" in found[-1].reason


@pytest.mark.parametrize("part", range(3))
def test_two_of_three_signs_do_not(part):
    values = [h if n == part else c for n, (h, c) in enumerate(zip(HEALTHY, COLLAPSED, strict=True))]
    assert not any(look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [values] * 10))


@pytest.mark.parametrize("kl", [0.2, -0.2])
def test_a_policy_that_is_far_away_raises_it_alone(kl):
    found = look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [(0.0, kl, 100.0, 0.6)] * 2)
    assert found[-1].step == 6


def test_responses_that_become_shorter_slowly_do_not():
    """Low-clip fraction and policy KL are those of a collapse; the length falls to a tenth, a percent per step."""
    slow = [(0.05, 0.03, 100 * 0.99**step, 0.6) for step in range(230)]
    config = replace(CONFIG, length_steps=20)
    assert not any(look(CollapseAlarm(config), slow))
    assert any(look(CollapseAlarm(config), [*slow, *[(0.05, 0.03, 5.0, 0.6)] * 2]))
    assert any(look(CollapseAlarm(replace(CONFIG, length_steps=40)), slow))


def test_one_bad_step_does_not():
    assert not any(look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + [(0.9, 0.9, 10.0, 0.0)] + [HEALTHY] * 5))


def test_it_is_raised_once_per_window_and_not_before_there_is_one():
    found = look(CollapseAlarm(CONFIG), [(0.5, 0.5, 1.0, 0.1)] * 7)
    assert [bool(one) for one in found] == [False, False, True, False, False, True, False]


def test_a_policy_kl_of_either_sign_is_a_distance():
    swinging = [(0.0, sign * 0.2, 100.0, 0.6) for sign in (1, -1, 1, -1)]
    assert look(CollapseAlarm(CONFIG), [HEALTHY] * 5 + swinging)[6].step == 6


def test_a_collapse_that_lasts_began_when_it_began():
    alarm = CollapseAlarm(CONFIG)
    found = look(alarm, [HEALTHY] * 5 + [COLLAPSED] * 5)
    assert [(one.step, one.began) for one in found if one] == [(6, 4), (9, 4)]
    look(alarm, [HEALTHY] * 3, 10)
    assert [one.began for one in look(alarm, [COLLAPSED] * 2, 13) if one] == [12], "another one"


def test_no_alarm_needs_a_checkpoint_that_was_not_safe():
    steps = [HEALTHY] * 5 + [COLLAPSED] * 4 + [HEALTHY] * 4 + [COLLAPSED] * 3
    alarm, safe = CollapseAlarm(CONFIG), []
    assert alarm.safe is None
    for number, values in enumerate(steps):
        _, raised = alarm.look(number, dict(zip(LOOKED_AT, values, strict=True)))
        assert raised is None or safe[-1] <= raised.began
        assert raised is None or alarm.safe == raised.began
        safe.append(alarm.safe)
    assert safe == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 10, 11, 12, 12]


def test_restored_it_goes_on_as_if_it_had_seen_all():
    steps = [HEALTHY] * 4 + [COLLAPSED] * 5
    for cut in range(len(steps)):
        first, second = CollapseAlarm(CONFIG), CollapseAlarm(CONFIG)
        whole = look(first, steps)
        look(second, steps[:cut])
        restored = CollapseAlarm(CONFIG)
        restored.restore(second.history)
        assert look(restored, steps[cut:], cut) == whole[cut:]


def test_steps_that_learn_nothing_are_passed_over():
    alarm = CollapseAlarm(CONFIG)
    assert alarm.look(0, {"rollout/response_tokens_mean": 3.0}) == ({}, None)
    assert not alarm.history
    off = CollapseAlarm(HealthConfig(action="off"))
    assert off.look(0, dict(zip(LOOKED_AT, COLLAPSED, strict=True))) == ({}, None)
    off.restore([(0, *HEALTHY)])
    assert off.safe is None


def empty(right, wrong):
    return {
        "sampler/groups_sampled": right + wrong,
        "sampler/groups_all_right": right,
        "sampler/groups_all_wrong": wrong,
    }


TRAINED = dict(zip(LOOKED_AT, HEALTHY, strict=True)) | {"rollout/groups": 4, "optimizer/updates": 2}
SKIPPED = {"rollout/groups": 4, "rollout/response_tokens_mean": 9.0, "rollout/accuracy": 0.5} | {
    "optimizer/updates": 2,
    "optimizer/skipped_updates": 2,
}
WORSE = empty(1, 9)


def alarms(steps, alarm=None):
    alarm = alarm or CollapseAlarm(CONFIG)
    return [alarm.look(number, values)[1] for number, values in enumerate(steps)]


@pytest.mark.parametrize("lost", [WORSE, SKIPPED, empty(0, 4)], ids=["wrong", "skipped", "all wrong"])
def test_a_window_of_lost_steps_is_a_collapse(lost):
    """The updates of the window before may be its cause: the checkpoint from before them is the safe one."""
    found = alarms([TRAINED] * 5 + [lost] * 3)
    assert [bool(one) for one in found] == [False] * 7 + [True]
    assert (found[-1].step, found[-1].began) == (7, 2)
    assert "nothing was learned in the last 3 steps: " in found[-1].reason
    assert ("no group was kept in 3 of them" in found[-1].reason) == (lost is not SKIPPED)
    assert ("every update was skipped in 3 of them" in found[-1].reason) == (lost is SKIPPED)


def test_a_policy_that_collapses_in_its_first_step_is_noticed():
    found = alarms([TRAINED, WORSE, SKIPPED, WORSE])
    assert (found[-1].step, found[-1].began) == (3, 0)
    assert "no group was kept in 2 of them, and at most 10% of the groups were all right" in found[-1].reason
    assert "every update was skipped in 1 of them" in found[-1].reason


def test_groups_that_are_all_right_or_were_never_kept_are_no_collapse():
    assert not any(alarms([TRAINED] * 5 + [empty(9, 1)] * 9)), "nothing is left to learn"
    assert not any(alarms([WORSE] * 9)), "it has never worked"
    assert not any(alarms([TRAINED] * 3 + [WORSE, WORSE, TRAINED, WORSE, WORSE, empty(9, 1), WORSE])), "not in a row"
    partly = SKIPPED | TRAINED | {"optimizer/skipped_updates": 1}
    assert not any(alarms([TRAINED] * 3 + [partly] * 5))


def test_lost_steps_are_restored():
    steps = [TRAINED] * 2 + [WORSE] * 2 + [empty(9, 1)] + [SKIPPED] * 7
    whole = alarms(steps)
    assert [one.step for one in whole if one] == [7, 10]
    for cut in range(len(steps)):
        first, restored = CollapseAlarm(CONFIG), CollapseAlarm(CONFIG)
        alarms(steps[:cut], first)
        restored.restore(first.history)
        found = [restored.look(number, steps[number])[1] for number in range(cut, len(steps))]
        assert found == whole[cut:]
