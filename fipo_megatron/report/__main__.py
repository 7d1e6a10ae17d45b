"""``fipo report RUN [RUN …]``: one page and one picture for one or several runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fipo_megatron.report.page import render
from fipo_megatron.report.picture import draw
from fipo_megatron.report.runs import RunError, read_runs
from fipo_megatron.storage.atomic import write_atomic

DONE, REFUSED = 0, 2
NO_PICTURE = "{}: not drawn, matplotlib is not installed; the page is complete (pip install 'fipo-megatron[report]')"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and returns the exit code.

    Args:
        arguments: Command-line arguments; None reads them from ``sys.argv``.
    """
    given = _parser().parse_args(arguments)
    try:
        runs = read_runs(given.run)
        stem = _stem(given.output, given.run)
        stem.parent.mkdir(parents=True, exist_ok=True)
        page = render(runs, smooth=given.smooth, responses=given.token_view, token_limit=given.token_limit)
        _publish(stem.with_name(f"{stem.name}.html"), page.encode())
        picture = stem.with_name(f"{stem.name}.png")
        if importlib.util.find_spec("matplotlib") is None:
            print(NO_PICTURE.format(picture), file=sys.stderr)
        else:
            _publish(picture, draw(runs, smooth=given.smooth))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo report",
        description="Draws the curves of one or several runs into a PNG and a self-contained HTML page.",
        epilog="exit codes: 0 done, 2 wrong arguments, or a path that holds no run or a damaged run",
    )
    parser.add_argument(
        "run", nargs="+", type=Path, metavar="RUN", help="run.output of a run; the run need not have ended"
    )
    parser.add_argument(
        "--output",
        metavar="DIR_OR_STEM",
        help="directory for report.html and report.png, or a path to which .html and .png are added"
        " (default: the run's directory for one run, the current directory for several)",
    )
    parser.add_argument(
        "--smooth", type=_count, default=1, metavar="N", help="smooth over N steps; the page has a control for it"
    )
    parser.add_argument(
        "--token-view",
        type=_count,
        default=40,
        metavar="N",
        help="responses of each run on the page (default 40; 0: none)",
    )
    parser.add_argument(
        "--token-limit", type=_positive, default=4000, metavar="N", help="tokens of each response (default 4000)"
    )
    return parser


def _count(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least {low}")
    return value


def _stem(output: str | None, runs: list[Path]) -> Path:
    """Returns the path of the report without a suffix."""
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
