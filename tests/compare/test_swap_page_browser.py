"""The page of swapped tokens in a real chromium: its curves, its tables, its marked tokens, and a silent console."""

import json

import pytest

from examples.quickstart.tiny_model import build_tokenizer
from fipo_megatron.compare import swap_page
from fipo_megatron.compare.swap_points import PointFiles, curves_of, points_of
from fipo_megatron.config import CompareConfig
from tests.report.report_runs import HOSTILE
from tests.report.test_report_browser import browser, check_quiet, select, text  # noqa: F401 - browser: a fixture

pytestmark = pytest.mark.browser
COMPARE = CompareConfig(select=("delta", "random"), share=(0.1, 0.3), seeds=(4,))


def numbers(accuracy, share=0.0):
    counts = {"responses": 8, "tokens": 100, "truncated": 0, "by_seed": [accuracy]}
    ends = {"low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"selected": share, "changed": share / 2, "accuracy": accuracy} | ends | counts


@pytest.fixture
def page(browser, tmp_path):  # noqa: F811 - the fixture of that name
    """Opens the page of two directions with two selectors; the text of responses tries to leave its place."""
    tokenizer = build_tokenizer([HOSTILE, "Answer: 5"])
    ids, files, curves = tokenizer(f"{HOSTILE} Answer: 5")["input_ids"], PointFiles(tmp_path), []
    row = {"prompt_id": "7", "sample": 0, "data_source": HOSTILE, "accuracy": 1, "finish_reason": "stop"}
    row |= {"prompt": HOSTILE, "response_ids": ids, "selected": [1, 3], "changed": [3], "quantity": [-6.5, -7.5]}
    at = {"value": 0.2, "low": 0.15, "high": None}
    for curve in curves_of(COMPARE):
        rows = []
        for number, point in enumerate(points_of(COMPARE, curve, 4)):
            files.responses(point).write_text(json.dumps(row) + "\n")
            rows.append(
                {"share": point.share, "threshold": -2.0, "recovered": 0.5} | numbers(0.5 + number / 4, point.share)
            )
        ends = {"share_at_90%": {"selected": at, "changed": at}}
        curves.append({"direction": curve.direction, "selector": curve.selector, "points": rows} | ends)
    result = {"base": HOSTILE, "rl": "rl", "temperature": 1.0, "seeds": [4], "curves": curves}
    result |= {"alone": {"base": numbers(0.2), "rl": numbers(0.9)}}
    (tmp_path / "report.html").write_text(swap_page.render(result, COMPARE, files, tokenizer))
    browser.get(f"file://{tmp_path}/report.html")
    yield browser
    check_quiet(browser)


def test_the_page_shows_curves_tables_and_marked_tokens(page):
    assert text(page, "#verdict .first") == "Accuracy of base alone 20 %, of RL alone 90 %."
    assert "if base draws and RL replaces: 20 % by delta, 20 % by random." in text(page, "#verdict")
    assert [link.text for link in select(page, "#parts a")] == ["Summary", "Curves", "Points", "Responses"]
    assert len(select(page, "#lines figure")) == 4
    assert len(select(page, "#lines circle")) == 4 * 2 * 2
    assert "20 % (15 % to > 30 %)" in text(page, "#recovered")
    assert len(select(page, "#table tbody tr")) == 8
    assert len(select(page, "#list button")) == 4
    tokens = select(page, ".tokens .token")
    page.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))", tokens[3])
    assert "−7.5" in text(page, "#tip")
    assert "changed" in text(page, "#tip")
    assert "Selector" in text(page, "#response .facts")
    assert HOSTILE.split()[0] in text(page, "#response details")
