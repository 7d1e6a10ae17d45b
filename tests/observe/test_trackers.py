"""Trackers return the values that they were given, read with the readers of TensorBoard and of the services."""

import os
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fipo_megatron.config import ObserveConfig
from fipo_megatron.observe.trackers import TensorBoard, as_markdown, open_trackers, tracker_problems
from tests.processes import children

ROW = {
    "step": 3,
    "prompt_id": "7",
    "sample": 1,
    "prompt": "1+1?",
    "response": "`2`\n</script>**x**",
    "reward": 1.0,
    "ground_truth": "2",
    "accuracy": 1,
    "advantage": 0.5,
    "response_tokens": 4,
}


def read(directory):
    found = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    return found


def test_tensorboard_says_what_it_was_told(tmp_path):
    tracker = TensorBoard(tmp_path, 0)
    for step in range(3):
        tracker.scalars(step, {"policy/loss": 0.5 * step, "evaluation/aime-2024/avg": 0.25})
    values = np.random.default_rng(0).normal(0, 1, 1000)
    counts, edges = np.histogram(values, bins=20)
    counts[3] = 0
    tracker.histogram(2, "policy/log_ratio_positive", edges, counts)
    tracker.text(2, "samples/responses", [ROW, ROW])
    tracker.close()
    found = read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("policy/loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert found.Tags()["scalars"] == ["policy/loss", "evaluation/aime-2024/avg"]
    (event,) = found.Histograms("policy/log_ratio_positive")
    histogram = event.histogram_value
    assert histogram.num == counts.sum()
    kept = [(limit, count) for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True) if count]
    assert [count for _, count in kept] == counts[counts > 0].tolist()
    assert [limit for limit, _ in kept] == pytest.approx(edges[1:][counts > 0].tolist())
    (text,) = found.Tensors("samples/responses/text_summary")
    assert text.tensor_proto.string_val[0].decode().count(as_markdown(ROW)) == 2


MARKDOWN = [
    *("\r", "\n", "\t", "`", "```", "~~~", "# H", "![i](http://x)", "[l](http://x)", "[x]: http://y", "**x**", "---"),
    *("<script>", "<!--", "-->", "<div>", "</div>", "<?", "<![CDATA[", "</code></pre>", "<img src=x>", "<http://x>"),
    *("&amp;", "    ", " ", "a", "| a | b |", "|--|--|", "* li", "1. x", "> q", "\\", "\x00", "\x02", "\x03", "\x0b"),
    *("\x1c", "\x85", "\u2028", "\u2029", "klzzwxh:0001", "\x02klzzwxh:0\x03"),
]


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def as_html(markdown):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugins.text.text_plugin import text_array_to_html

    return text_array_to_html(np.array(markdown), enable_markdown=True)


@given(texts=st.lists(st.lists(st.sampled_from(MARKDOWN), max_size=8).map("".join), min_size=4, max_size=4))
@example(texts=["# 7", "x\r# H\r![i](http://x)", "y\r[l](http://x)", "`**2**"])
def test_texts_are_inert_in_tensorboard(texts):
    """No text of data or policy becomes a heading, a link or an image on TensorBoard's page, and all are shown."""
    row = ROW | dict(zip(("prompt_id", "prompt", "response", "ground_truth"), texts, strict=True))
    page = Page(as_html(as_markdown(row)))
    assert page.tags <= {"p", "pre", "code"}
    shown = "".join(page.text.split())
    for text in texts:
        assert "".join(re.sub("[\x00-\x1f\x7f-\x9f]", " ", text).split()) in shown.replace("\ufffd", "")


def test_a_resumed_run_leaves_one_curve(tmp_path):
    for first, value in ((0, 1.0), (3, 2.0)):
        tracker = TensorBoard(tmp_path, first)
        for step in range(first, 5):
            tracker.scalars(step, {"policy/loss": value})
        tracker.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("policy/loss")] == [
        *((step, 1.0) for step in range(3)),
        *((step, 2.0) for step in range(3, 5)),
    ]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
@pytest.mark.filterwarnings("ignore")
def test_services_without_a_service(name, tmp_path, monkeypatch):
    """Their own packages, which write to the disk alone."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    config = ObserveConfig(tensorboard=False, trackers=(name,), project="tests")
    assert not tracker_problems(config, writes=True)
    (tracker,) = open_trackers(config, tmp_path / "run", {"seed": 1}, 0)
    counts, edges = np.histogram(np.linspace(-3, 3, 1025), bins=1025)
    for step in (5, 3):  # as after a return
        tracker.scalars(step, {"policy/loss": 0.625 + step})
        tracker.histogram(step, "policy/log_ratio_positive", edges, counts)
        tracker.text(step, "samples/responses", [ROW])
    tracker.close()
    assert not children()
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(b"policy/loss" in content for content in written)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_without_a_key_is_told_at_start(name, tmp_path, monkeypatch):
    """The packages themselves look for the key; nothing is asked for, even on a terminal."""
    for variable in [key for key in os.environ if key.startswith(("WANDB_", "SWANLAB_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = ObserveConfig(tensorboard=False, trackers=(name,))
    (problem,) = tracker_problems(config, writes=True)
    assert problem.startswith(f"observe.trackers = ['{name}']: {name} cannot report: it has no API key; ")
    assert problem.endswith(f"{name.upper()}_MODE=offline")
    assert not tracker_problems(config, writes=False)
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "0123456789" * 4)
    assert not tracker_problems(config, writes=True)


def test_a_key_of_wandb_in_a_netrc_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0123456789" * 4)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not tracker_problems(ObserveConfig(trackers=("wandb",)), writes=True)


@pytest.mark.filterwarnings("ignore")
def test_a_service_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    with pytest.raises(OSError, match=r"observe\.trackers = \['wandb'\]: wandb cannot be opened: "):
        open_trackers(ObserveConfig(tensorboard=True, trackers=("wandb",)), tmp_path, {}, 0)


def test_what_is_not_installed_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tracker_problems(ObserveConfig(trackers=("wandb",)), writes=True) == [
        "observe.tensorboard = True: tensorboard is not installed here",
        "observe.trackers = ['wandb']: wandb is not installed here",
    ]


def test_nothing_in_a_response_ends_its_block():
    lines = as_markdown(ROW).splitlines()[1:]
    assert all(not line or line.startswith("    ") for line in lines)
    assert "    </script>**x**" in lines
