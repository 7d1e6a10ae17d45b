"""Forms of answers, their precedence, thinking, and the work that extraction needs."""

import sys

import pytest

from fipo_megatron.reward.extraction import after_thinking, extract, unbox, unwrap


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("**Final Answer:** **73**", "73"),
        ("## Final Answer\n\n$73$", "73"),
        ("**Final Answer**\n73", "73"),
        ("__Answer__: 5", "5"),
        ("Answer:\n```\n5\n```", "5"),
        ("Answer:\n- 5\n- because", "5"),
        ("Answer: \\[\n5\n\\]\nDone.", "5"),
        ("Answer：－５", "-5"),
        ("Answer: \u20135\u200b", "-5"),
        ("\\fbox{5}", "5"),
        ("\\boxed 5", "5"),
        ("#### 1,234", "1,234"),
        ("#### Step 2\nThe answer is 5.", "5"),
        ("<answer>5</answer>", "5"),
        ("So the answer is therefore 5. I checked it.", "5"),
        ("the answer is 4\nAnswer: 5", "5"),
        ("Answer: 5\nSo the answer is 6", "5"),
        ("Answer: 3\nCorrection: \\boxed{5}", "5"),
        ("\\boxed{5}\nAnswer: 3", "3"),
        ("\\boxed{5} or \\boxed{6}", "5, 6"),
        ("Answer: 5 or \\boxed{6}", "5 or 6"),
        ("Answer: \\boxed{5} and \\boxed{6}", "5 and 6"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\{\\}}", "\\{\\}"),
    ],
)
def test_forms(response, found):
    assert extract(response) == found


def test_only_what_follows_thinking_counts():
    assert extract("<think>Answer: 3</think>\nAnswer: 5") == "5"
    assert extract("a</think>b</think>Answer: 5") == "5"
    assert extract("<think>\\boxed{5}</think> So it is 3.") is None
    assert extract("<think>Answer: 5") is None
    assert extract("Answer: 3[/T]Answer: 5[/T]", ["[/T]"]) is None
    assert extract("Answer: 3[/T]Answer: 5", ["[/T]", "</think>"]) == "5"
    assert extract("<think>Answer: 5</think>", []) == "5</think>"
    assert after_thinking("a</think>b") == "b"


def test_unwrapping():
    assert unwrap("***5***") == unwrap("`5`") == unwrap("$5$.") == unwrap("**$5$**") == "5"
    assert unwrap("|x|") == "|x|"
    assert unwrap("5;") == unwrap('"5"') == "5"
    assert unbox(r"\boxed{5} or \boxed{6}") == "5 or 6"


def steps(text):
    """Returns the number of Python lines that the extraction executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        extract(text)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{}",
        "Answer:",
        "Answer:\n",
        "answer is ",
        "#### ",
        "<answer>",
        "{",
        "*",
        "\\boxed{5} or ",
        "> ",
    ],
)
def test_the_work_is_linear_in_the_length(unit):
    """Twice the text needs at most twice the lines of Python; the regular expressions repeat within bounds."""
    short, long = (steps(unit * (length // len(unit))) for length in (20_000, 40_000))
    assert long <= 2.1 * short + 200
    assert short <= 20 * 20_000
