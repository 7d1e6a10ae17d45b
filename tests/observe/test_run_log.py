"""The files of a run are read back as they were written."""

import json
from dataclasses import replace

from fipo_megatron.config import load_config
from fipo_megatron.observe.collapse_alarm import LOOKED_AT
from fipo_megatron.observe.run_log import RunLog
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
