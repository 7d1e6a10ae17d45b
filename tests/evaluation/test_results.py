"""Rows, tags, tables and files of a small evaluation, by hand."""

import json

import pytest

from fipo_megatron.config import Config, RunConfig
from fipo_megatron.evaluation import evaluation_summary as summary
from fipo_megatron.evaluation.estimates import vote
from fipo_megatron.evaluation.results import Evaluation, ProblemResult, data_set_name, name_problems
from fipo_megatron.observe.metrics import FAILED, METRICS, OF_DATA_SETS
from fipo_megatron.observe.run_log import RunLog


def problem(data_set, problem_id, answers, truth="5", lengths=(10, 20, 30, 40), truncated=0):
    right = [answer == truth for answer in answers]
    return ProblemResult.of(data_set, problem_id, truth, right, lengths, truncated, vote(answers, right))


@pytest.fixture
def evaluation():
    return Evaluation(
        (
            problem("one", "1", ["5", "5", "7", None]),
            problem("one", "2", ["7", "5", "7", "5"], truncated=1),
            problem("two", "3", [None] * 4, lengths=(1, 1, 1, 1)),
        )
    )


def test_a_row(evaluation):
    assert summary.asdict(evaluation.problems[1]) == {
        "data_set": "one",
        "id": "2",
        "ground_truth": "5",
        "samples": 4,
        "right": 2,
        "answered": 4,
        "answers": {"7": 2, "5": 2},
        "response_tokens": 25.0,
        "truncated": 1,
        "consensus": "7",
        "consensus_right": False,
        "failed": 0,
    }


def test_scalars_are_the_tags_of_the_table_of_metrics(evaluation):
    scalars = evaluation.scalars()
    known = {metric.tag for metric in METRICS if metric.group == "evaluation" and not metric.when.endswith(FAILED)}
    assert {tag.replace("/one/", "/{data_set}/").replace("/two/", "/{data_set}/") for tag in scalars} == known
    assert len(scalars) == 2 + 2 * len(OF_DATA_SETS)
    assert scalars["evaluation/accuracy"] == pytest.approx(4 / 12)
    assert scalars["evaluation/response_tokens"] == pytest.approx(51 / 3)
    assert scalars["evaluation/one/avg"] == 0.5
    assert scalars["evaluation/one/cons"] == 0.5
    assert scalars["evaluation/one/pass"] == 1
    assert scalars["evaluation/one/truncated_fraction"] == 1 / 8
    assert scalars["evaluation/two/avg"] == scalars["evaluation/two/cons"] == scalars["evaluation/two/pass"] == 0
    assert scalars["evaluation/two/avg_low"] is None


def test_where_a_verifier_names_no_answers_there_is_no_cons():
    row = ProblemResult.of("one", "1", "5", [True, False], [1, 1], 0, vote([None, None], [True, False]))
    scalars = Evaluation((row, row)).scalars()
    assert scalars["evaluation/one/avg"] == 0.5
    assert [scalars[f"evaluation/one/cons{end}"] for end in ("", "_low", "_high")] == [None] * 3


def test_the_table_is_aligned(evaluation):
    lines = summary.table(evaluation).splitlines()
    assert lines[0].split() == ["data", "set", "problems", "avg@4", "cons@4", "pass@4", "tokens", "truncated"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "50.0% (" in lines[1]
    assert lines[2].split() == ["two", "1", "0.0%", "0.0%", "0.0%", "1.0", "0.0%"]
    assert lines[4].split() == ["data", "set", "pass@1", "pass@2", "pass@4"]


def test_the_summary_can_be_read_again(evaluation, tmp_path):
    summary.write(tmp_path, evaluation, {"model": "m"})
    read = json.loads((tmp_path / summary.SUMMARY).read_text())
    assert read["model"] == "m"
    assert read["scalars"] == evaluation.scalars()
    assert read["data_sets"]["one"]["pass"]["2"]["value"] == pytest.approx(5 / 6)
    assert "failed_checks" not in read
    rows = [json.loads(line) for line in (tmp_path / summary.PROBLEMS).read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert [ProblemResult(**row) for row in rows] == list(evaluation.problems)
    assert sorted(file.name for file in tmp_path.iterdir()) == [summary.PROBLEMS, summary.SUMMARY]


def test_failed_checks_are_left_out_and_counted(tmp_path):
    """Two of three verdicts of problem 1 are right, one of two of problem 2; problem 3 and data set two have none."""
    evaluation = Evaluation(
        (
            problem("one", "1", ["5", "5", "7"]),
            problem("one", "2", ["7", "5"]),
            problem("one", "3", []),
            problem("two", "4", []),
        )
    )
    assert [row.failed for row in evaluation.problems] == [1, 2, 4, 4]
    assert evaluation.accuracy == 3 / 5
    scalars = evaluation.scalars()
    assert scalars["evaluation/failed_checks"] == 11
    assert scalars["evaluation/one/avg"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scalars["evaluation/one/pass"] == 1
    assert scalars["evaluation/one/response_tokens"] == 25
    assert scalars["evaluation/two/avg"] is scalars["evaluation/two/cons"] is scalars["evaluation/two/pass"] is None
    assert "11 responses whose check failed are left out." in summary.table(evaluation)
    summary.write(tmp_path, evaluation, {})
    assert json.loads((tmp_path / summary.SUMMARY).read_text())["failed_checks"] == 11
    rows = [json.loads(line) for line in (tmp_path / summary.PROBLEMS).read_text().splitlines()]
    assert [ProblemResult(**row) for row in rows] == list(evaluation.problems)


def test_resume_cuts_evaluations(evaluation, tmp_path):
    log = RunLog(Config(run=RunConfig(output=str(tmp_path))), writes=True)
    for step in (0, 10, 20):
        log.evaluation(step, evaluation)
    (tmp_path / "evaluations" / ".step-000020.jsonl.partial").write_text("half")
    log.cut(10)
    assert [file.name for file in (tmp_path / "evaluations").iterdir()] == ["step-000000.jsonl"]
    assert log.evaluations() == {0: pytest.approx(4 / 12)}


def test_names_of_data_sets():
    assert [data_set_name(name) for name in ("AIME 2024/II", "held_out", "a.b-c", "")] == [
        "AIME_2024_II",
        "held_out",
        "a.b-c",
        "unnamed",
    ]
    assert name_problems(["a", "b", "a"]) == []
    (text,) = name_problems(["a b", "a/b"])
    assert "'a/b' and 'a b': both are called a_b" in text
