"""What a response gives as its answer, and whether that equals the right one. Runs in a bounded child process."""

from __future__ import annotations

import logging
import re
from fractions import Fraction

MAX_ANSWER_CHARACTERS = 300
"""A longer answer is wrong: no problem with a short solution has one, and symbolic algebra on it takes for ever."""

_ANSWER_LINE = re.compile(r"answer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_SIMPLE_FRACTION = re.compile(r"([+-]?)\\frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_NOISE = re.compile(r"\\[!,;: ]|\\left|\\right|\s+|\\displaystyle")


def extract(response: str) -> str | None:
    r"""The text after the last ``Answer:``, else in the last ``\boxed{}``; without what is wrapped around it."""
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
    r"""What is in the last ``\boxed{...}`` whose braces are balanced."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for at in range(start + len(r"\boxed"), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : at]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def unwrap(answer: str) -> str:
    """Without dollar signs, emphasis and a full stop around it."""
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


def normalised(answer: str) -> str:
    """The answer without spaces and what changes its looks only."""
    answer = _NOISE.sub("", answer).replace("dfrac", "frac").replace("tfrac", "frac").replace("−", "-")
    return _THOUSANDS.sub("", answer)


def number(answer: str) -> Fraction | None:
    """The value of a decimal number, a quotient of two or a LaTeX fraction of integers."""
    if match := _SIMPLE_FRACTION.fullmatch(answer):
        bottom = int(match[3])
        return Fraction(int(match[1] + match[2]), bottom) if bottom else None
    parts = answer.split("/")
    if len(parts) > 2 or not answer.isascii() or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def exact(response: str, ground_truth: str) -> tuple[bool, str | None]:
    """Whether the answer, or the whole response where it gives none, is the right one but for white space."""
    found = extract(response)
    answer = response if found is None else found
    if len(answer) > MAX_ANSWER_CHARACTERS + len(ground_truth):
        return False, answer[:MAX_ANSWER_CHARACTERS]
    return " ".join(answer.split()) == " ".join(ground_truth.split()), answer


def math(response: str, ground_truth: str) -> tuple[bool, str | None]:
    """Whether the answer is equal to the right one: as text, as a number, or symbolically (math-verify)."""
    answer = extract(response)
    if not answer:
        return False, None
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False, answer[:MAX_ANSWER_CHARACTERS]
    mine, right = normalised(answer), normalised(unwrap(ground_truth))
    if mine == right:
        return True, answer
    values = number(mine), number(right)
    if None not in values:
        return values[0] == values[1], answer
    return _symbolic(answer, unwrap(ground_truth)), answer


def _symbolic(answer: str, ground_truth: str) -> bool:
    """Whether math-verify takes them for equal; its own time-outs are off, the child process is bounded."""
    import math_verify  # type: ignore[import-untyped]

    logging.disable(logging.WARNING)
    gold, found = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (ground_truth, answer))
    return bool(gold and found and math_verify.verify(gold, found, timeout_seconds=None))
