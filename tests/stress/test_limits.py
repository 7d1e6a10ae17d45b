"""Budget files: what can be limited, what is refused, and what counts as violated."""

import pytest

from fipo_megatron.stress.limits import METRICS, Limit, read_limits, violations
from tests.processes import ROOT

PARTS, LENGTHS = ("engine", "actor"), (64, 128)


def read(path, text):
    file = path / "budget.yaml"
    file.write_text(text)
    return read_limits(file, PARTS, LENGTHS)


def test_a_limit_is_a_number_or_a_number_for_each_length(tmp_path):
    limits = read(tmp_path, "engine.failures: 0\nactor.update_seconds: {64: 1.5, 128: 6}\n")
    assert limits == (
        Limit("engine.failures", None, 0.0),
        Limit("actor.update_seconds", 64, 1.5),
        Limit("actor.update_seconds", 128, 6.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected limits such as"),
        ("- 1", "expected limits such as"),
        ("{", "cannot be read: "),
        ("actor.update_second: 1", "actor.update_second: unknown metric; did you mean actor.update_seconds?"),
        ("17: 1", f"17: unknown metric; valid: {', '.join(METRICS)}"),
        ("drift.p99: 1", "drift.p99: the part drift does not run; add it to --parts engine,actor"),
        ("actor.peak_gib: {256: 1}", "actor.peak_gib: 256: is none of --lengths 64,128"),
        ("actor.peak_gib: [1]", r"actor.peak_gib = \[1\]: must be a finite number"),
        ("actor.peak_gib: .inf", "actor.peak_gib = inf: must be a finite number"),
        ("actor.peak_gib: true", "actor.peak_gib = True: must be a finite number"),
        ("actor.peak_gib: {64: x}", "actor.peak_gib = x: must be a finite number"),
    ],
)
def test_limits_that_could_not_be_compared_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_every_problem_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)actor.x: unknown.*drift.max: the part"):
        read(tmp_path, "actor.x: 1\ndrift.max: 1\n")


def test_violations():
    rows = [
        {"length": 64, "metrics": {"tokens_per_second": 100.0, "failures": 0, "kv_usage": None}},
        {"length": 128, "metrics": {"tokens_per_second": 50.0, "failures": 1, "kv_usage": 0.25}},
    ]

    def violated(metric, bound, length=None):
        return violations([Limit(f"engine.{metric}", length, bound)], {"engine": rows})

    assert violated("tokens_per_second", 50.0) == []
    assert violated("tokens_per_second", 51.0) == ["engine.tokens_per_second at 128 tokens: 50, must be at least 51"]
    assert violated("tokens_per_second", 51.0, length=64) == []
    assert violated("failures", 0.0) == ["engine.failures at 128 tokens: 1, must be at most 0"]
    assert violated("failures", 1.0) == []
    assert violated("kv_usage", 0.5) == ["engine.kv_usage at 64 tokens: has no value; must be at most 0.5"]


def test_the_documentation_lists_every_metric():
    page = (ROOT / "docs" / "stress.md").read_text(encoding="utf-8")
    rows = [f"| `{metric}` | {direction} | {meaning} |" for metric, (direction, meaning) in METRICS.items()]
    assert not [row for row in rows if row not in page]


def test_a_length_that_was_not_measured_violates_its_limits():
    rows = [{"length": 64, "failure": "out of memory", "metrics": {}}]
    found = violations([Limit("actor.peak_gib", None, 1.0)], {"actor": rows})
    assert found == ["actor.peak_gib at 64 tokens: has no value; must be at most 1"]
