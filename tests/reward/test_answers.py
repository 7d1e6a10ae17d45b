"""Extraction of answers, and their comparison on 209 pairs labelled by hand."""

from fractions import Fraction
from pathlib import Path

import pytest

from fipo_megatron.reward import answers
from tests.reward import agreement

PAIRS = Path(__file__).with_name("labelled_pairs.tsv")
DISAGREEMENTS = {("1e3", "1000"), ("3:2", r"\frac{3}{2}")}
"""Pairs whose label pairs.tsv contradicts; docs/rewards.md names them, too."""

REJECTED = {("hack", "Answer: 5 = 3", "3", True)}
"""Labels of pairs.tsv that are rejected: an answer that states a false equation is wrong."""


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Answer: 34", "34"),
        ("First\nAnswer: 12\nNo, wait.\nanswer :  $34$.\n", "34"),
        ("**Answer:** 34", "34"),
        ("Answer: \\boxed{34}", "34"),
        ("Answer: $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("so \\boxed{1} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{12} then \\boxed{{34}", "12"),
        ("\\boxed{1}\nAnswer: 2", "2"),
        ("Answer: 2\n\\boxed{3}", "3"),
        ("Answer:\nFinal.\n\\boxed{3}", "3"),
        ("Answer: $$", None),
        ("no such thing", None),
        ("", None),
    ],
)
def test_the_last_answer_counts(response, found):
    assert answers.extract(response) == found


def test_pairs_labelled_by_hand():
    """The pairs match their labels except for the known disagreements, so a change of either is noticed."""
    lines = [line.split("\t") for line in PAIRS.read_text().splitlines()]
    assert len(lines) >= 200
    assert sum(label == "0" for _, _, label in lines) > 60
    wrong = {(a, g) for a, g, label in lines if answers.math(f"Answer: {a}", g)[0] != (label == "1")}
    assert wrong == DISAGREEMENTS


def test_pairs_of_a_teacher():
    """The pairs of pairs.tsv match their labels except for the labels that docs/rewards.md rejects."""
    pairs = agreement.pairs()
    assert len(pairs) == 355
    assert {pair for pair in pairs if not agreement.agrees(pair)} == REJECTED


def test_numbers_are_compared_exactly():
    assert answers.parse_number("-3/6") == Fraction(-1, 2)
    assert answers.parse_number("1.50") == Fraction(3, 2)
    assert answers.parse_number("1/0") is None
    assert answers.parse_number("٣٤") is None
    assert answers.parse_number("1/2/3") is None
    assert answers.math("Answer: 0.30000000000000001", "0.3") == (False, "0.30000000000000001")


def test_long_answers_are_wrong_without_being_read():
    assert answers.math("Answer: " + "1+" * 200 + "1", "201")[0] is False
    assert answers.math("Answer: " + "1+" * 100 + "1", "101")[0] is True


def test_exact():
    assert answers.exact("Answer:  a   b ", "a b") == (True, "a   b")
    assert answers.exact("a b", "a b") == (True, "a b")
    assert answers.exact("Answer: 1/2", "0.5")[0] is False
    assert answers.exact("x" * 10_000, "x")[0] is False


def judge(pair):
    answer, truth = pair.split(" | ")
    return answers.math(f"Answer: {answer}", truth)[0]


@pytest.mark.parametrize(
    "pair",
    [
        r"4343_6 | 4343_7",
        r"3+\mathrm{i} | 3-\mathrm{i}",
        r"g(3)=7 | g(3)=8",
        r"\frac{1}{3^{50}} | \frac{1}{3^{51}}",
        r"5\text{ hours} | 5\text{ minutes}",
        r"5\text{ apples} | 5\text{ oranges}",
        r"5 \approx 5.1 | 5",
        r"5^{*} | 5",
        r"\text{about } 5 | 5",
        r"2^{1000000} | 2^{1000001}",
        r"\sqrt{12} | 3.4641016",
        r"0.\overline{3} | 0.3",
        r"\int_0^1 x dx + C | \frac{1}{2}",
        "100 200 | 100200",
        "1, 000 | 1000",
        "2+2=5 | 5",
        "(1,2) | 1, 2",
        "x=1, y=2 | x=2, y=1",
        "5, maybe 6 | 5",
        "5 7/3 | 22/3",
        "nan | nan",
    ],
)
def test_no_part_of_an_answer_is_dropped(pair):
    assert not judge(pair)


@pytest.mark.parametrize(
    "pair",
    [
        r"\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}",
        r"5\text{ hours} | 300\text{ minutes}",
        r"x<3 \text{ or } x>5 | (-\infty,3)\cup(5,\infty)",
        r"0.\overline{142857} | 1/7",
        r"3^{10^{10}} | 3^{10^{10}}",
        r"x = 2+3 = 5 | 5",
        r"(x,y)=(1,2) | (1,2)",
        r"\textbf{(B)}\ 5 | B",
        r"k\pi \ (k \in \mathbb{Z}) | k\pi",
        "0.0000001 | 1e-7",
        "10^{22} | 1e22",
        "-2 1/3 | -7/3",
        "2·3² | 18",
        "The minimum is 5 | 5",
        "5 because it is prime | 5",
        "3x+2y=5 | 6x+4y=10",
        "5 | Answer: 5",
    ],
)
def test_equal_answers_in_other_words(pair):
    assert judge(pair)


def test_a_truth_that_nothing_matches():
    assert not answers.usable_truth(" $$ ")
    assert not answers.usable_truth("NaN")
    assert answers.usable_truth("0")
    assert answers.exact("", "") == (False, "")


def test_math_verify_is_believed_only_if_it_read_everything():
    assert answers.parsed_whole("x^2+37", "x**2 + 37")
    assert not answers.parsed_whole("x^2+37", "x**2")
    assert not answers.parsed_whole(r"5\text{ hours}", "5")
