"""``fipo moments RUN|FILE …``: transitions between the answers within responses, Oops and Aha."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fipo_megatron.config import ConfigError, RewardConfig, load_config
from fipo_megatron.data.failed_checks import VerifierError
from fipo_megatron.moments.candidates import LANGUAGES, CandidateExtractor, Phrases
from fipo_megatron.moments.rates import MomentSummary, most, text_table
from fipo_megatron.moments.response_rows import ResponseRow, RowsError, response_rows
from fipo_megatron.moments.transitions import JudgedResponse, ResponseMoments, judge_response, judge_with
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
DONE, FAILED, REFUSED = 0, 1, 2
_AT_ONCE = 256
_PROGRESS_SECONDS = 10.0
_EXCERPT = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts the moments of responses and returns the exit code.

    Args:
        arguments: Command-line arguments; None reads them from ``sys.argv``.
    """
    given = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        reward = _reward(given)
        extractor = CandidateExtractor.named(given.extractor, _phrases(given))
        rows = response_rows(given.paths)
        responses = asyncio.run(judge_all(rows, extractor, reward))
    except (RowsError, ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except (VerifierError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    summary = MomentSummary.of(responses)
    excerpts = [_excerpt(one, one.moments) for one in most(responses, given.excerpts) if one.moments]
    print(text_table(summary))
    for one in excerpts[: given.excerpts]:
        print(f"\n{one['kind']} in {one['response']}: {one['candidates']}\n  {one['text']!r}")
    if given.output is not None:
        settings = {"paths": list(map(str, given.paths)), "verifier": reward.verifier, "extractor": given.extractor}
        content = settings | summary.as_dict() | {"excerpts": excerpts}
        given.output.mkdir(parents=True, exist_ok=True)
        write_atomic(given.output / "moments.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"\n{given.output}/moments.json")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo moments",
        description="Finds the answers within each response, judges them in order, and counts how they change.",
        epilog="docs/what_rl_changed.md has the definitions. Exit codes: 0 done, 1 the verifier failed, 2 wrong"
        " arguments or files",
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN|FILE", help="directory of a run or comparison, or a .jsonl file")
    add("--verifier", metavar="NAME", help="reward.verifier (default: that of the run's config.yaml, else math)")
    add(
        "--extractor",
        default="boxed,answer,phrase",
        metavar="NAMES",
        help="of boxed, answer and phrase, or python:MODULE.FUNCTION (default: all three)",
    )
    add("--languages", default=",".join(LANGUAGES), metavar="NAMES", help="languages of the phrases (default: en,zh)")
    add("--phrases", type=Path, metavar="FILE", help="file in the format of moments/phrases.json, with more languages")
    add("--excerpts", type=int, default=5, metavar="N", help="excerpts of Oops and of Aha (default 5)")
    add("--output", type=Path, metavar="DIR", help="directory for moments.json (default: none is written)")
    return parser


def _phrases(given: argparse.Namespace) -> Phrases:
    languages = tuple(given.languages.split(","))
    return Phrases.read(languages, given.phrases) if given.phrases else Phrases.read(languages)


def _reward(given: argparse.Namespace) -> RewardConfig:
    """Returns the section ``reward`` of the first run, with the verifier of the command line."""
    configured = next((path / "config.yaml" for path in given.paths if (path / "config.yaml").is_file()), None)
    reward = RewardConfig() if configured is None else load_config(configured).reward
    return reward if given.verifier is None else replace(reward, verifier=given.verifier)


async def judge_all(
    rows: Sequence[ResponseRow], extractor: CandidateExtractor, reward: RewardConfig
) -> list[JudgedResponse]:
    """Judges the candidates of all responses, in the order of the rows.

    Raises:
        VerifierError: The verifier does not work.
        ValueError: The verifier's name is invalid.
    """
    verifier = open_verifier(reward)
    done, last = 0, time.monotonic()

    async def one(row: ResponseRow) -> JudgedResponse:
        judge = judge_with(verifier, reward.verifier, row.ground_truth, row.prompt, row.data_source)
        found = await judge_response(row.response, extractor, judge)
        moments = found if isinstance(found, ResponseMoments) else None
        return JudgedResponse(row.name, row.step, row.finish_reason, row.accuracy, moments, row.tokens)

    try:
        responses: list[JudgedResponse] = []
        for start in range(0, len(rows), _AT_ONCE):
            responses += await asyncio.gather(*(one(row) for row in rows[start : start + _AT_ONCE]))
            done = len(responses)
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                logger.info("%d of %d responses", done, len(rows))
        return responses
    finally:
        await verifier.close()


def _excerpt(response: JudgedResponse, moments: ResponseMoments) -> dict[str, Any]:
    """Returns the text from before the deciding candidate to the end of the last one, with its middle cut out."""
    first = moments.right.index(True) if moments.oops else 0
    start, end = moments.candidates[first].start, moments.candidates[-1].end
    text = moments.text[max(0, start - _EXCERPT) : end]
    if len(text) > 6 * _EXCERPT:
        text = f"{text[: 3 * _EXCERPT]} […] {text[-3 * _EXCERPT :]}"
    marked = [f"{c.text} ({'right' if r else 'wrong'})" for c, r in zip(moments.candidates, moments.right, strict=True)]
    return {
        "kind": ("Oops" if moments.oops else "Aha") + (", strict" if moments.strict else ""),
        "response": response.name,
        "step": response.step,
        "candidates": " → ".join(marked),
        "text": text,
    }


if __name__ == "__main__":
    sys.exit(main())
