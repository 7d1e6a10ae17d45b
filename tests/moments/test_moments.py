"""Candidates, transitions and rates: texts labelled by hand, planted rates, and the quickstart's task."""

import asyncio
import json
import random
import re

import pytest

from examples.quickstart import task
from fipo_megatron import cli
from fipo_megatron.config import RewardConfig
from fipo_megatron.evaluation.estimates import wilson
from fipo_megatron.moments.__main__ import judge_all
from fipo_megatron.moments.candidates import CandidateExtractor, Phrases, snippet
from fipo_megatron.moments.rates import MomentSummary
from fipo_megatron.moments.response_rows import ResponseRow
from fipo_megatron.moments.transitions import moments_of
from fipo_megatron.reward import answers
from tests.moments import labelled

EXTRACTOR = CandidateExtractor()
LABELLED = labelled.read()


def judged(text, truth, verifier="math"):
    cleaned, candidates = EXTRACTOR(text)
    check = getattr(answers, verifier)
    right = [check(snippet(candidate, verifier), truth)[0] for candidate in candidates]
    return moments_of(cleaned, candidates, right, EXTRACTOR)


@pytest.fixture(scope="module")
def found():
    return [judged(one.text, one.truth) for one in LABELLED]


def precision_and_recall(pairs):
    """Returns both for pairs of found and labelled items."""
    both = sum(len(a & b) for a, b in pairs)
    return both / sum(len(a) for a, _ in pairs), both / sum(len(b) for _, b in pairs)


def test_there_are_enough_labelled_texts():
    assert len(LABELLED) >= 200
    assert sum("答案" in one.text for one in LABELLED) >= 20
    assert sum(one.oops for one in LABELLED) >= 20
    assert sum(one.aha for one in LABELLED) >= 40


@pytest.mark.parametrize("kind", ["candidates", "oops", "aha", "strict", "transition"])
def test_precision_and_recall(found, kind):
    pairs = []
    for got, label in zip(found, LABELLED, strict=True):
        if kind == "candidates":
            a = set(enumerate(zip((c.text for c in got.candidates), got.right, strict=True)))
            b = set(enumerate(zip(label.values, label.right, strict=True)))
        elif kind == "strict":
            a, b = {"strict"} if got.strict else set(), {"strict"} if label.strict else set()
        elif kind == "transition":
            several = len(label.right) > 1
            b = {"RW"[not label.right[0]] + "→" + "RW"[not label.right[-1]]} if several else set()
            a = {got.transition} - {None}
        else:
            a, b = ({kind} if getattr(each, kind) else set() for each in (got, label))
        pairs.append((a, b))
    precision, recall = precision_and_recall(pairs)
    assert precision >= 0.95
    assert recall >= 0.95


def test_the_measure_notices_missing_filters():
    """Without the words for what is no statement, precision falls: the labels can fail."""
    known, never = Phrases.read(), re.compile(r"(?!)")
    loose = CandidateExtractor(phrases=Phrases(known.answer, known.reflection, never, never, never, never))
    pairs = [(set(enumerate(c.text for c in loose(one.text)[1])), set(enumerate(one.values))) for one in LABELLED]
    assert precision_and_recall(pairs)[0] < 0.95


def test_equal_answers_in_another_form_are_no_change():
    got = judged("The answer is 073. In lowest terms \\boxed{73}.", "73")
    assert got.transition == "R→R"
    assert not got.oops


def test_every_cut_of_a_text_can_be_read():
    for one in LABELLED:
        for end in range(0, len(one.text), 7):
            EXTRACTOR(one.text[:end])


def planted(total, oops, aha, seed):
    """Returns texts with exactly these numbers of strict Oops and Aha, among texts with traps."""
    rng = random.Random(seed)
    kinds = ["oops"] * oops + ["aha"] * aha
    plain = ["one", "restated", "quoted", "twice", "wrong"]
    kinds += [plain[i % len(plain)] for i in range(total - len(kinds))]
    rng.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds):
        right = rng.randint(10, 999)
        wrong = right + rng.randint(1, 9)
        text = {
            "oops": f"So the answer is {right}. Wait, let me recheck. Answer: {wrong}",
            "aha": f"\\boxed{{{wrong}}}? No. I take \\boxed{{{wrong}}}. Hmm, that is wrong. \\boxed{{{right}}}",
            "one": f"{right - 1} + 1 = {right}.\nAnswer: {right}",
            "restated": f"Is the answer {wrong}? It is not. The answer is {right}.",
            "quoted": f'The problem says "the answer is {wrong}". In fact \\boxed{{{right}}}.',
            "twice": f"The answer is 0{right}. Wait, as an integer: \\boxed{{{right}}}",
            "wrong": f"Wait. The answer is {wrong}.",
        }[kind]
        rows.append(ResponseRow(str(number), text, str(right), step=number % 2, tokens=20))
    return rows


@pytest.mark.parametrize(("oops", "aha"), [(60, 20), (20, 60)])
def test_planted_rates_are_found_exactly(oops, aha):
    """3 % and 1 % of 2,000 texts."""
    rows = planted(2000, oops, aha, seed=oops)
    summary = MomentSummary.of(asyncio.run(judge_all(rows, EXTRACTOR, RewardConfig())))
    counts = summary.complete.counts
    assert (counts["responses"], counts["oops"], counts["aha"]) == (2000, oops, aha)
    assert (counts["oops_strict"], counts["aha_strict"]) == (oops, aha)
    assert counts["several"] == oops + aha + 384
    assert summary.as_dict()["complete"]["rates"]["oops"]["responses"]["rate"] == oops / 2000
    assert sum(part.counts["oops"] for part in summary.by_step.values()) == oops


def test_the_plain_quickstart_has_none(tmp_path, capsys):
    task.build(tmp_path, seed=1)
    rows = []
    for line in (tmp_path / "examples.jsonl").read_text().splitlines()[-500:]:
        example = json.loads(line)
        numbers = example["prompt"].removeprefix("Last digit of ").removesuffix("?").split("+")
        rows.append({"response": example["response"], "answer": sum(map(int, numbers)) % 10})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["moments", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path), "--verifier", "exact"]) == 0
    found = json.loads((tmp_path / "moments.json").read_text())["complete"]
    assert (found["counts"]["responses"], found["counts"]["several"]) == (500, 0)
    assert found["rates"]["oops"]["several"] == {"count": 0, "of": 0, "rate": None, "low": None, "high": None}
    assert "with at least two 0" in capsys.readouterr().out


def with_recheck(numbers, rng):
    """Returns the quickstart's answer with a re-check that may be right or wrong, and what happened."""
    first = task.worked(numbers, rng.choice([0, 2, len(numbers) - 1]), rng)
    truth = str(sum(numbers) % 10)
    before = first.rpartition(" ")[2]
    if rng.random() < 0.5:
        return first, (before == truth,), truth
    after = truth if rng.random() < 0.6 else str((int(truth) + rng.randint(1, 9)) % 10)
    doubt = rng.choice(["Wait, check again.", "Let me recheck.", "Again:"])
    return f"{first}\n{doubt}\nAnswer: {after}", (before == truth, after == truth), truth


def test_a_task_with_rechecks_matches_a_direct_count():
    rng = random.Random(4)
    rows, oops, aha = [], 0, 0
    for number in range(1000):
        text, right, truth = with_recheck(task.digits(rng), rng)
        rows.append(ResponseRow(str(number), text, truth))
        oops += right[0] and not right[-1]
        aha += right[-1] and not right[0]
    counts = MomentSummary.of(asyncio.run(judge_all(rows, EXTRACTOR, RewardConfig(verifier="exact")))).complete.counts
    assert (counts["oops"], counts["aha"]) == (oops, aha)
    assert min(oops, aha) > 20
    assert 0 < counts["oops_strict"] < oops


def own_extractor(text):
    """Finds ``Result N`` for the test of the command."""
    return [(m.start(), m.end(), m[1]) for m in re.finditer(r"Result (\d+)", text)]


def test_the_command_with_an_extractor_of_its_own(tmp_path, capsys):
    rows = [
        {"step": 3, "prompt_id": "a", "response": "Result 4. Wait. Result 5", "ground_truth": "5", "accuracy": 1},
        {"step": 3, "prompt_id": "b", "response": "Result 5. Result 4", "ground_truth": "5", "accuracy": 0},
        {"response": "Result 5. Result 4", "answer": 5, "finish_reason": "length"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"response": "unfin')
    given = ["moments", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.main([*given, "--extractor", "python:tests.moments.test_moments.own_extractor"]) == 0
    found = json.loads((tmp_path / "out" / "moments.json").read_text())
    assert found["complete"]["transitions"] == {"R→R": 0, "R→W": 1, "W→R": 1, "W→W": 0}
    assert (found["complete"]["counts"]["oops"], found["complete"]["counts"]["aha_strict"]) == (1, 1)
    assert found["truncated"]["counts"]["oops"] == 1
    assert found["by_step"]["3"]["counts"]["responses"] == 2
    assert "4 (wrong) → 5 (right)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("{}\n", [], "line 1: response = None: must be text"),
        ('{"response": "a"}\n', [], "ground_truth = None: must be text or a number"),
        ("no\n", [], "line 1"),
        ("", [], "hold no responses"),
        ('{"response": "a", "answer": "b"}\n', ["--extractor", "box"], "must be of boxed, answer, phrase"),
        ('{"response": "a", "answer": "b"}\n', ["--languages", "en,xx"], "languages = xx: must be of en, zh"),
        ('{"response": "a", "answer": "b"}\n', ["--verifier", "nothing"], "reward.verifier = nothing: must be"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, content, arguments, message):
    (tmp_path / "rows.jsonl").write_text(content)
    assert cli.main(["moments", str(tmp_path / "rows.jsonl"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_responses_is_named(tmp_path, capsys):
    assert cli.main(["moments", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no responses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_are_those_of_the_literature(count, total, low, high):
    """Brown, Cai and DasGupta 2001, and R's binom.confint."""
    assert wilson(count, total) == pytest.approx((low, high), abs=1e-4)
