"""Extraction of the answer from a response and its comparison with the right one. Runs in a bounded child process."""

from __future__ import annotations

import logging
import re
from fractions import Fraction

MAX_ANSWER_CHARACTERS = 300
"""Longest answer that is compared. A longer one is wrong: no short solution is that long, and symbolic algebra on it
may not terminate."""

_ANSWER_LINE = re.compile(r"answer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_SIMPLE_FRACTION = re.compile(r"([+-]?)\\frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_NOISE = re.compile(r"\\[!,;: ]|\\left|\\right|\s+|\\displaystyle")


def extract(response: str) -> str | None:
    r"""Returns the unwrapped text after the last ``Answer:`` or, without one, in the last ``\boxed{}``."""
    found = None
    for match in _ANSWER_LINE.finditer(response):
        if match[1].strip(" \t*$"):
            found = match[1]
    if found is None:
        found = last_boxed(response)
    elif (inner := last_boxed(found)) is not None:
        found = inner
    return None if found is None else unwrap(found)


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last ``\boxed{...}`` whose braces are balanced."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len(r"\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : end]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def unwrap(answer: str) -> str:
    """Removes the dollar signs, brackets, emphasis and full stop around an answer."""
    answer = answer.strip()
    changed = True
    while changed:
        changed = False
        if answer.endswith("."):
            answer, changed = answer[:-1].rstrip(), True
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if len(answer) > len(left) + len(right) and answer.startswith(left) and answer.endswith(right):
                answer, changed = inner.strip(), True
    return answer


def normalise(answer: str) -> str:
    """Removes spaces, thousands separators and LaTeX commands that only change the appearance."""
    answer = _NOISE.sub("", answer).replace("dfrac", "frac").replace("tfrac", "frac").replace("−", "-")
    return _THOUSANDS.sub("", answer)


def parse_number(answer: str) -> Fraction | None:
    """Returns the value of a decimal number, a quotient of two or a LaTeX fraction of integers; None for other text."""
    if match := _SIMPLE_FRACTION.fullmatch(answer):
        denominator = int(match[3])
        return Fraction(int(match[1] + match[2]), denominator) if denominator else None
    parts = answer.split("/")
    if len(parts) > 2 or not answer.isascii() or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def exact(response: str, ground_truth: str) -> tuple[bool, str | None]:
    """Compares the answer with the right one up to white space; without an answer, compares the whole response.

    Returns:
        Whether they are equal, and the answer.
    """
    extracted = extract(response)
    answer = response if extracted is None else extracted
    if len(answer) > MAX_ANSWER_CHARACTERS + len(ground_truth):
        return False, answer[:MAX_ANSWER_CHARACTERS]
    return " ".join(answer.split()) == " ".join(ground_truth.split()), answer


def math(response: str, ground_truth: str) -> tuple[bool, str | None]:
    """Compares the answer with the right one as text, as a number, and symbolically (math-verify).

    Returns:
        Whether they are equal, and the answer; None without an answer.
    """
    answer = extract(response)
    if not answer:
        return False, None
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False, answer[:MAX_ANSWER_CHARACTERS]
    given, expected = normalise(answer), normalise(unwrap(ground_truth))
    if given == expected:
        return True, answer
    values = parse_number(given), parse_number(expected)
    if None not in values:
        return values[0] == values[1], answer
    return _symbolic(answer, unwrap(ground_truth)), answer


def _symbolic(answer: str, ground_truth: str) -> bool:
    """Compares with math-verify. Its own time-outs are off because the child process is bounded."""
    import math_verify  # type: ignore[import-untyped]  # the package ships no type information

    logging.disable(logging.WARNING)
    gold, found = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (ground_truth, answer))
    return bool(gold and found and math_verify.verify(gold, found, timeout_seconds=None))
