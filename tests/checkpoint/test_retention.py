"""Retention of checkpoints: every return that the alarm may ask for finds one."""

import pytest

from fipo_megatron.checkpoint.retention import steps_to_keep
from fipo_megatron.config import HealthConfig
from fipo_megatron.observe.collapse_alarm import LOOKED_AT, CollapseAlarm

HEALTHY, COLLAPSED = ({**dict.fromkeys(LOOKED_AT, 0.5), "policy/policy_kl": kl} for kl in (0.0, 9.0))


def test_the_newest_the_best_and_two_to_return_to():
    steps = [2, 4, 6, 8, 10, 12]
    assert steps_to_keep(steps, 2, {}, None) == {10, 12}
    assert steps_to_keep(steps, 2, {2: 0.5, 4: 0.7, 6: 0.7, 7: 0.9}, None) == {6, 10, 12}
    assert steps_to_keep(steps, 1, {}, 7) == {6, 8, 12}
    assert steps_to_keep(steps, 1, {}, 1) == {2, 12}
    assert steps_to_keep(steps, 1, {}, 12) == {12}
    assert steps_to_keep([], 1, {}, 3) == set()


@pytest.mark.parametrize("window", [1, 3, 10, 20])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("newest", [1, 3])
def test_there_is_always_one_from_before_an_alarm(window, every, newest):
    """However long the run was healthy before, the checkpoint is not much older than the window."""
    for healthy in range(every, every + 3 * window, 3):
        alarm, kept = CollapseAlarm(HealthConfig(window=window)), set()
        for step in range(healthy + window):
            _, raised = alarm.look(step, HEALTHY if step < healthy else COLLAPSED)
            if raised is not None:
                break
            if (step + 1) % every == 0:
                kept = steps_to_keep([*kept, step + 1], newest, {}, alarm.safe)
        assert raised is not None
        assert len(kept) <= newest + 2
        sound = [step for step in kept if step <= raised.began]
        assert sound or raised.began < every
        assert not sound or raised.began - max(sound) < window + every
