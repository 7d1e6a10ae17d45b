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


def test_rows_that_the_alarm_or_the_best_checkpoint_cannot_use_are_set_aside(tmp_path, caplog):
    config = load_config(CONFIG)
    log = RunLog(replace(config, run=replace(config.run, output=str(tmp_path))), writes=True)
    looked = {**LEARNED, "health/alarm": 0.0}
    flipped = {("policy/policy_kL" if tag == "policy/policy_kl" else tag): value for tag, value in looked.items()}
    rows = [looked, flipped, looked | {"rollout/accuracy": "0.5"}, looked]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s} | row) + "\n" for s, row in enumerate(rows)))
    evaluations = [{"evaluation/accuracy": 0.5}, {"evaluation/accurace": 0.5}, {"evaluation/accuracy": None}]
    text = "".join(json.dumps({"step": s} | row) + "\n" for s, row in enumerate(evaluations))
    (tmp_path / "evaluation.jsonl").write_text(text)
    (tmp_path / "alarms.jsonl").write_bytes(b"\xff\xfe garbage")
    for _ in range(2):
        log.cut(4)
        assert [one[0] for one in log.seen()] == [0, 3]
        assert log.evaluations() == {0: 0.5}
    warnings = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl: row 2 has no number policy/policy_kl, row 3 has no number rollout/accuracy;" in warnings[0]
    assert "metrics.jsonl: has no row of step 1, 2; the collapse alarm" in warnings[1]
    assert "evaluation.jsonl: row 2 has no number evaluation/accuracy;" in warnings[2]
    assert "alarms.jsonl: row 1 is not UTF-8;" in warnings[3]
