"""Lines are aligned; ranks are named; how far sampling is reaches the log."""

import logging
import time

from rich.console import Console

from fipo_megatron.observe import console
from fipo_megatron.rollout.sampling_progress import ProgressSnapshot, SamplingProgress, combine_snapshots

VALUES = {tag: 0.5 for _, tag, _, _ in console.COLUMNS}


def test_a_line_per_step_below_its_header(caplog):
    caplog.set_level(logging.INFO)
    lines = console.StepLines()
    lines.say(3, 200, VALUES, {"generate": 12.34, "sync": 0.01, "step": 13.06})
    lines.say(140, 200, VALUES | {"policy/loss": -12.5, "policy/entropy": None}, {"update": 1.0, "step": 100.0})
    header, first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("  3/200 ")
    assert second.startswith("140/200 ")
    for title, _, _, _ in console.COLUMNS:
        end = header.index(title) + len(title)
        assert first[end - 1] != " "
        assert second[end - 1] != " "
    assert first.endswith("     13.1  generate 12.3")
    assert second.endswith("    100.0  update 1.0")
    assert len(header) == len(first.partition("  generate")[0])


def test_columns_that_do_not_exist_are_left_out(caplog):
    caplog.set_level(logging.INFO)
    console.StepLines().say(0, 9, {"policy/loss": 1.0}, {})
    assert "accuracy" not in caplog.records[0].getMessage()


def test_ranks_other_than_the_first_warn_with_their_rank(capsys):
    try:
        assert console.set_up_logging(3, plain=False) is None
        logging.getLogger("fipo_megatron.x").info("unheard")
        logging.getLogger("fipo_megatron.x").warning("heard")
        said = capsys.readouterr().err
        assert "rank 3 WARNING heard" in said
        assert "unheard" not in said
    finally:
        logging.basicConfig(force=True)


def test_sampling_is_shown_in_the_log_and_on_a_terminal(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console, "_QUIET_SECONDS", 0.01)
    now = ProgressSnapshot(12, 8192, 90_000, 61.7)
    with console.show_sampling_progress(None, lambda: now):
        while not caplog.records:
            time.sleep(0.01)
    said = caplog.records[0].getMessage()
    assert "sampling: 12 of 8,192 responses" in said
    assert "oldest request in flight for 62 s" in said
    terminal, shown = Console(force_terminal=True, width=140, record=True), ""
    end = time.monotonic() + 30
    with console.show_sampling_progress(terminal, lambda: now):
        while "12 of 8,192 responses" not in shown and time.monotonic() < end:
            time.sleep(0.1)
            shown += terminal.export_text()
    assert "12 of 8,192 responses" in shown


def test_progress_of_several_ranks():
    progress = SamplingProgress()
    with progress.response():
        time.sleep(0.01)
        assert progress.now()[:3] == (0, 1, 0)
        assert progress.now().oldest_seconds >= 0.01
    progress.complete(7)
    assert progress.now()[:3] == (1, 1, 7)
    assert combine_snapshots([progress.now(), ProgressSnapshot(2, 3, 4, 99.0)]) == (3, 4, 11, 99.0)
    assert combine_snapshots([]) == (0, 0, 0, 0.0)
