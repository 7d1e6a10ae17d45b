"""``python -m fipo_megatron.report RUN [RUN …]``: one picture and one page for one or several runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fipo_megatron.report.page import render
from fipo_megatron.report.picture import draw
from fipo_megatron.report.runs import RunError, read_runs
from fipo_megatron.storage.atomic import write_atomic

DONE, REFUSED = 0, 2


def main(arguments: list[str] | None = None) -> int:
    """Writes the report; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        runs = read_runs(given.run)
        stem = _stem(given.output, given.run)
        stem.parent.mkdir(parents=True, exist_ok=True)
        page = render(runs, smooth=given.smooth, responses=given.token_view, token_limit=given.token_limit)
        _publish(stem.with_name(f"{stem.name}.html"), page.encode())
        _publish(stem.with_name(f"{stem.name}.png"), draw(runs, smooth=given.smooth))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fipo_megatron.report",
        description="Draws the curves of one or several runs into a PNG and a self-contained HTML page.",
        epilog="exit codes: 0 done, 2 wrong arguments, or a path that holds no run or a damaged one",
    )
    parser.add_argument(
        "run", nargs="+", type=Path, metavar="RUN", help="run.output of a run; it may still be going on"
    )
    parser.add_argument(
        "--output",
        metavar="DIR_OR_STEM",
        help="directory that gets report.html and report.png, or a path to which .html and .png are added"
        " (default: the run's directory for one run, the current one for several)",
    )
    parser.add_argument(
        "--smooth", type=_count, default=1, metavar="N", help="mean over N steps; the page can change it"
    )
    parser.add_argument(
        "--token-view",
        type=_count,
        default=40,
        metavar="N",
        help="responses of each run in the page (default 40; 0: none)",
    )
    parser.add_argument(
        "--token-limit", type=_positive, default=4000, metavar="N", help="tokens of each of them (default 4000)"
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _stem(output: str | None, runs: list[Path]) -> Path:
    """Where the report goes, without suffix."""
    if output is None:
        return (runs[0] if len(runs) == 1 else Path()) / "report"
    path = Path(output)
    if path.is_dir() or output.endswith(os.sep):
        return path / "report"
    return path.with_suffix("") if path.suffix in (".html", ".png") else path


def _publish(path: Path, content: bytes) -> None:
    write_atomic(path, content)
    print(f"{path}: {len(content) / 2**20:.2f} MiB")


if __name__ == "__main__":
    sys.exit(main())
