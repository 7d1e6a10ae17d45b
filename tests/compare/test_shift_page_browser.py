"""The page of a comparison in a real chromium: its figures, its coloured tokens, and a silent console."""

import json

import numpy as np
import pytest

from examples.quickstart.tiny_model import build_tokenizer
from fipo_megatron.compare import shift_page, shift_summary
from fipo_megatron.compare.divergences import QUANTITIES
from fipo_megatron.compare.shift import row_of
from fipo_megatron.data.trajectory import Prompt, Trajectory
from tests.report.report_runs import HOSTILE
from tests.report.test_report_browser import browser, check_quiet, one, select, text  # noqa: F401 - browser: a fixture

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, tmp_path):  # noqa: F811 - the fixture of that name
    """Opens the page of three made-up responses, whose text tries to leave its place."""
    tokenizer = build_tokenizer([HOSTILE, "Answer: 5"])
    rng = np.random.default_rng(0)
    rows, prompts = [], []
    for number in range(3):
        ids = np.array(tokenizer(f"{HOSTILE} Answer: {number}")["input_ids"])
        zeros, ones = np.zeros(len(ids), np.float32), np.ones(len(ids), np.bool_)
        one_response = Trajectory(Prompt(HOSTILE, ids, "5"), number, ids, zeros, ones, accuracy=number % 2)
        values = rng.random((len(QUANTITIES), len(ids)))
        values[QUANTITIES.index("delta"), 3] = -6.5
        values[QUANTITIES.index("rank") :] = 1
        rows.append(row_of(one_response, number, values, tokenizer))
        prompts.append(HOSTILE)
    file = tmp_path / "tokens.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = shift_summary.TokenTable.read(file)
    summary = {"base": HOSTILE, "rl": "rl", "temperature": 1.0} | shift_summary.summarise(table, tokenizer)
    (tmp_path / "report.html").write_text(shift_page.render(summary, table, file, prompts, tokenizer))
    browser.get(f"file://{tmp_path}/report.html")
    yield browser
    check_quiet(browser)


def test_the_page_shows_figures_and_tokens(page):
    assert text(page, "#verdict .first").startswith("At 0 % of ")
    links = [link.text for link in select(page, "#parts a")]
    assert links == ["Summary", "Histograms", "Profile", "Responses", "Most changed"]
    one(page, "#theme").click()
    assert page.execute_script("return document.documentElement.dataset.theme") == "dark"
    assert len(select(page, "#bars figure")) == len(select(page, "#lines figure")) == 8
    assert len(select(page, "#list button")) == 3
    assert [option.text for option in select(page, "#colour-by option")][:2] == [
        "JS divergence (nats)",
        "KL(RL ‖ base) (nats)",
    ]
    one(page, "#colour-by option[value=delta]").click()
    page.execute_script("document.querySelector('.tokens').focus()")
    tokens = select(page, ".tokens .token")
    assert "below" in tokens[3].get_attribute("class")
    page.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))", tokens[3])
    assert "−6.5" in text(page, "#tip")
    assert "rank of RL's first choice in base" in text(page, "#tip")
    assert HOSTILE.split()[0] in text(page, "#response details")
