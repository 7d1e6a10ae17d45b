"""The report's page in a real chromium: what a person sees, points at and clicks, and that nothing else happens."""

import json
import os
import re
import shutil

import pytest

from fipo_megatron.report.__main__ import main
from tests.report.report_runs import HOSTILE, make_run

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1400,1000"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    os.environ["SE_OFFLINE"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.get("about:blank")
    driver.get_log("performance")  # discards the log of the browser's own first page
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a healthy run, and of it beside one that collapses at step 41 and is still going on."""
    base = tmp_path_factory.mktemp("runs")
    good = make_run(base / "good", seed=1)
    broken = make_run(base / "broken", seed=2, lr=1e-3, collapse=41, alarm=52, steps=64, planned=80)
    assert main([str(good), "--output", str(base / "one")]) == 0
    assert main([str(good), str(broken), "--output", str(base / "two"), "--smooth", "5"]) == 0
    return base


@pytest.fixture
def page(browser, pages):
    """Opens the page of two runs; checks afterwards that the console is empty and nothing was requested."""
    browser.get(f"file://{pages}/two.html")
    yield browser
    check_quiet(browser)


def check_quiet(browser):
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith("file:")] == []


def select(browser, css):
    return browser.find_elements("css selector", css)


def one(browser, css):
    (found,) = select(browser, css)
    return found


def text(browser, css):
    return one(browser, css).text


def point_at(browser, css, share=0.6):
    """Moves the real pointer over an element, at a share of its width."""
    from selenium.webdriver import ActionChains

    element = one(browser, css)
    browser.execute_script(
        "document.documentElement.style.scrollBehavior = 'auto'; arguments[0].scrollIntoView({block: 'center'})",
        element,
    )
    x = int((share - 0.5) * element.size["width"])
    ActionChains(browser).move_to_element_with_offset(element, x, 0).perform()


def fill(browser, css, value):
    element = one(browser, css)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.clear()
    element.send_keys(value)


def choose(browser, css, value):
    from selenium.webdriver.support.select import Select

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(browser, css))
    Select(one(browser, css)).select_by_value(value)


def points(browser):
    """Per chart: how many points the longest of its paths has."""
    script = """return Object.fromEntries([...document.querySelectorAll('.chart:not([hidden])')].map((chart) => [
      chart.id, Math.max(0, ...[...chart.querySelectorAll('path.line, path.stack')].map(
        (path) => (path.getAttribute('d').match(/[ML]/g) ?? []).length))]))"""
    return browser.execute_script(script)


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_chart_is_drawn(browser, pages, name):
    browser.get(f"file://{pages}/{name}.html")
    found = points(browser)
    assert len(found) == {"one": 23, "two": 24}[name]  # the parts of a step have a chart for each run
    assert min(found.values()) >= 8, found
    assert found["chart-entropy"] == 80
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.getBoundingClientRect().width)"
    )
    assert min(sizes) > 200
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert len(select(browser, ".chart path.flag")) == {"one": 0, "two": 23}[name]
    check_quiet(browser)


def test_charts_are_wide_enough_to_read(page):
    """The columns of a wide window are not more than fit."""
    before = page.get_window_size()
    page.set_window_size(1700, 1000)
    try:
        assert min(chart.size["width"] for chart in select(page, "#charts figure")) >= 420
    finally:
        page.set_window_size(before["width"], before["height"])


def test_summary_says_which_run_is_better(page):
    assert text(page, "#verdict .first").startswith("good is best: ")
    assert "broken is" in text(page, "#verdict")
    assert "policy KL rose" in text(page, "#verdict")
    assert "best" in text(page, "#headline tr.best th")
    assert "64 of 80" in text(page, "#headline")
    assert text(page, "#differing tbody") == "actor.optimizer.lr 0.0003 0.001"
    row = one(page, "#table tr[data-tag='policy/policy_kl']")
    assert "k1 estimate" in row.text
    fill(page, "#find", "grad_norm")
    assert [row.get_attribute("data-tag") for row in select(page, "#table tbody tr") if row.is_displayed()] == [
        "optimizer/grad_norm"
    ]


def test_pointing_at_a_chart_tells_the_values_of_all_runs(page):
    point_at(page, "#chart-policy-kl .plot", 0.7)
    told = text(page, "#tip")
    assert re.match(r"step \d+\n", told)
    assert re.search(r"good, policy KL −?[\d.e−]+ mean −?[\d.e−]+", told)
    assert "broken, policy KL" in told
    assert len(select(page, ".cursor line")) > 15, "the cursor is in all charts"
    point_at(page, "#chart-time-0 .plot", 0.5)
    assert "together" in text(page, "#tip")
    point_at(page, "h1")
    assert not one(page, "#tip").is_displayed()


def test_alarms_are_told_where_they_are(page):
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(page, "#chart-accuracy"))
    line = one(page, "#chart-accuracy line.alarm")
    plot = one(page, "#chart-accuracy .plot")
    x = float(line.get_attribute("x1")) / plot.size["width"]
    point_at(page, "#chart-accuracy .plot", x)
    assert "Alarm of broken at step 52 (stop): policy KL 0.031" in text(page, "#tip")


def test_keys_tell_values_too(page):
    one(page, "#chart-entropy .plot").send_keys("\ue014\ue014\ue014")  # three times to the right
    assert text(page, "#tip").startswith("step 2\n")


def test_runs_can_be_hidden(page):
    before = len(select(page, "#chart-entropy path.line"))
    button = select(page, ".chip")[1]
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert len(select(page, "#chart-entropy path.line")) == before // 2
    assert select(page, ".chart:not([hidden]) path.flag") == []
    assert not one(page, "#chart-time-1").is_displayed()
    button.click()
    assert len(select(page, "#chart-entropy path.line")) == before


def test_range_of_steps_and_smoothing(page):
    from selenium.webdriver import ActionChains

    wide = one(page, "#chart-entropy path.line:not(.raw).c0").get_attribute("d")
    one(page, "#smooth").send_keys("\ue014")
    assert text(page, "#smooth-value") == "mean of 10 steps"
    assert one(page, "#chart-entropy path.line:not(.raw).c0").get_attribute("d") != wide
    point_at(page, "#chart-entropy .plot", 0.5)
    plot = one(page, "#chart-entropy .plot")
    ActionChains(page).move_to_element(plot).click_and_hold().move_by_offset(100, 0).release().perform()
    begin, end = (int(one(page, f"#{name}").get_attribute("value")) for name in ("from", "to"))
    assert 0 < begin < end < 80
    assert points(page)["chart-entropy"] <= end - begin + 3
    one(page, "#all-steps").click()
    assert points(page)["chart-entropy"] == 80


def test_filters_reduce_the_list(page):
    assert len(select(page, ".row")) == 80
    choose(page, "#filter-answer", "wrong")
    wrong = select(page, ".row")
    assert 0 < len(wrong) < 80
    assert all("✗ wrong" in row.text for row in wrong)
    choose(page, "#filter-run", "1")
    fill(page, "#filter-step-from", "50")
    fill(page, "#filter-response_tokens-to", "110")
    few = select(page, ".row")
    assert 0 < len(few) < len(wrong)
    assert text(page, "#listed") == f"{len(few)} of 80 responses"
    for row in few:
        step, tokens = (int(re.search(pattern, row.text)[1]) for pattern in (r"step (\d+)", r"(\d+) tokens"))
        assert step >= 50
        assert tokens <= 110
        assert "broken" in row.text
    fill(page, "#filter-reward-from", "0.5")
    assert select(page, ".row") == []
    assert "No response passes" in text(page, "#response")


def colours(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor)"
    )


def test_tokens_are_coloured_by_what_is_chosen(page):
    seen = [colours(page)]
    assert len(set(seen[0])) > 5
    for mode, ends in (("shift", "≤ −"), ("entropy", "0"), ("future_kl", "≤ −"), ("mismatch", "≤ −")):
        choose(page, "#colour-by", mode)
        seen.append(colours(page))
        assert text(page, ".scale").startswith(ends)
        assert "≥" in text(page, ".scale")
    assert len({tuple(each) for each in seen}) == 5


def test_pointing_at_a_token_tells_all_its_numbers(page):
    page.execute_script("arguments[0].id = 'this-token'", select(page, ".token")[3])
    point_at(page, "#this-token", 0.5)
    told = text(page, "#tip")
    assert told.startswith("token 4 of ")
    for name in (
        "behaviour",
        "π old",
        "π current",
        "shift",
        "ratio",
        "mismatch",
        "Future-KL",
        "weight f",
        "entropy",
        "version",
    ):
        assert re.search(rf"{name}.* −?\d", told), name


def test_hostile_text_is_text(page):
    found = {"token": False, "prompt": False, "plain": False}
    for row in select(page, ".row"):
        page.execute_script("arguments[0].click()", row)
        inside = page.execute_script("return document.getElementById('response').textContent")
        if "text only" in row.text:
            found["plain"] |= "No token values are recorded" in inside
        else:
            tokens = page.execute_script("return [...document.querySelectorAll('.token')].map(t => t.textContent)")
            found["token"] |= HOSTILE in tokens
        found["prompt"] |= HOSTILE in inside
    assert all(found.values()), found
    assert select(page, "img, iframe, #response script") == []
    assert len(select(page, "script")) == 2
    assert "broken into" not in page.title
    policy = one(page, "meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_light_and_dark(page):
    back = "return getComputedStyle(document.body).backgroundColor"
    first = page.execute_script(back)
    one(page, "#theme").click()
    assert page.execute_script(back) != first


def test_a_noise_floor_of_exactly_0_is_at_the_bottom_of_a_logarithmic_chart(browser, tmp_path):
    run = make_run(tmp_path / "exact", seed=3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "noise/shift" in row]
    for row in measured:
        row["noise/shift"] = 0.0
    for row in measured[2:]:
        del row["noise/shift"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(run), "--output", str(tmp_path / "page")]) == 0
    browser.get(f"file://{tmp_path}/page.html")
    marks = select(browser, "#chart-noise-shift circle.mark")
    floor = max(float(line.get_attribute("y1")) for line in select(browser, "#chart-noise-shift line.tick"))
    assert marks
    assert all(float(mark.get_attribute("cy")) == pytest.approx(floor, abs=5) for mark in marks)
    assert "NaN" not in one(browser, "#chart-noise-shift").get_attribute("innerHTML")
    check_quiet(browser)
