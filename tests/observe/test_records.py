"""What the files of a run hold, and what is read back from them."""

import json
from dataclasses import replace
from math import inf, nan

import pytest

from fipo_megatron.actor.update_metrics import NoiseFloor
from fipo_megatron.config import load_config
from fipo_megatron.observe.collapse_alarm import LOOKED_AT
from fipo_megatron.observe.run_log import RunLog
from fipo_megatron.observe.step_metrics import noise_metrics
from tests.runs import CONFIG

LEARNED = dict.fromkeys(LOOKED_AT, 0.5)


def test_the_alarm_begins_anew_after_it_was_off(tmp_path):
    config = load_config(CONFIG)
    log = RunLog(replace(config, run=replace(config.run, output=str(tmp_path))), writes=True)
    looked = {**LEARNED, "health/alarm": 0.0}
    cases = [([], [0, 2]), ([looked], [0, 1, 3]), ([LEARNED], [1, 3]), ([looked, LEARNED, looked], [2, 3, 5])]
    for before, expected in cases:
        rows = [*before, looked, {"rollout/accuracy": 0.1}, looked]
        lines = [json.dumps({"step": step} | row) + "\n" for step, row in enumerate(rows)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        assert [one[0] for one in log.seen()] == expected


@pytest.mark.parametrize("noise", [inf, nan])
def test_a_noise_floor_that_is_no_number_is_not_one_in_the_file(noise):
    values = {"policy/shift_abs_max": 0.1, "future_kl/abs_max": 0.1}
    found = noise_metrics(NoiseFloor(noise, 0.01), values, fipo=True)
    assert found["noise/shift"] is found["noise/shift_ratio"] is None
    assert (found["noise/future_kl"], found["noise/future_kl_ratio"]) == (0.01, pytest.approx(0.1))
