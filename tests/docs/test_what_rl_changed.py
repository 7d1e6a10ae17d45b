"""The figures of docs/what_rl_changed.md are those of the committed results."""

import json
import re

import pytest

from benchmarks.result_table import RESULTS
from benchmarks.what_rl_changed_tables import sentences, tables
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "what_rl_changed.md"


def missing(text, results):
    """Returns the tables and sentences that the page lacks, however its lines are broken."""
    flat = re.sub(r"\s+", " ", text)
    return [found for found in tables(results) if f"\n{found}\n" not in text] + [
        found for found in sentences(results) if found not in flat
    ]


def test_tables_and_sentences_have_the_figures_of_the_results():
    assert (len(tables(RESULTS)), len(sentences(RESULTS))) == (5, 7)
    assert not missing(PAGE.read_text(encoding="utf-8"), RESULTS)


def test_shift_and_swap_compare_the_same_models():
    shift, swap = (json.loads((RESULTS / f"quickstart_{name}.json").read_text()) for name in ("shift", "swap"))
    assert shift["models_sha256"] == swap["models_sha256"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("shift", ("responses_of", "base", "positions")),
        ("shift", ("responses_of", "base", "most_changed_tokens", 0, "js_share")),
        ("swap", ("curves", 0, "points", 1, "accuracy")),
        ("swap", ("located", "first_tokens")),
        ("amplify", ("settings", 3, "amplified", "entropy")),
        ("amplify", ("base_first", 1, "control", "temperature")),
        ("amplify", ("choice", "reported_on", "accuracy", "rl", "value")),
    ],
)
def test_another_figure_is_noticed(tmp_path, name, path):
    for file in RESULTS.glob("quickstart_*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    result = json.loads((tmp_path / f"quickstart_{name}.json").read_text())
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] *= 2
    (tmp_path / f"quickstart_{name}.json").write_text(json.dumps(result))
    assert missing(PAGE.read_text(encoding="utf-8"), tmp_path)
