"""The verifiers ``math`` and ``exact``. They run in a bounded child process; see :mod:`.child`."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from fipo_megatron.reward import comparison
from fipo_megatron.reward.extraction import THINKING_END as THINKING_END
from fipo_megatron.reward.extraction import after_thinking, clean_characters, last_boxed, unbox
from fipo_megatron.reward.extraction import extract as extract
from fipo_megatron.reward.extraction import unwrap as unwrap
from fipo_megatron.reward.latex_tokens import simplify_notation

MAX_ANSWER_CHARACTERS = 300
"""Longest answer that is compared. A longer one is wrong: no short solution is that long, and symbolic algebra on it
may not terminate."""
MAX_TRUTH_CHARACTERS = 2000
"""Longest right answer that is compared by value; a longer one is compared as text."""

_MAX_EXPONENT = 400
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_SIMPLE_FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{(\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
_THOUSANDS = re.compile(r"(?<![\d,.(])\d{1,3}(?:,\d{3})+(?!,?\d)")
_NOISE = re.compile(r"\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|[\s\u202f]+")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?\s*(?:[.):]\s*\S.*)?", re.DOTALL)
_LEAD = re.compile(
    r"(?:so|thus|hence|therefore|the|our|its|it|we|which|this|that|there)\b[^$\\\d\n]{0,60}?\b(?:is|are|equals|get|have|be)\b"
    r"(?! not\b):?\s+(?=\S)",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?:option|choice)\s+(?=\(?[A-J]\)?(?:\W|$))", re.IGNORECASE)
_REMARK = re.compile(
    r"(?:\s*[,;.(]|\s)\s*(?:as (?:shown|above|required|desired|we|in|expected|claimed|stated)|because|since|"
    r"which|where|by the|from the|i\.e\.|that is|for (?:all|every|any)|"
    r"(?<=[;,] )(?:this|it|that) is|-\s+(?:the|this|it|that)|//)(?:\b|\s).*$",
    re.IGNORECASE | re.DOTALL,
)
_NOTE = re.compile(
    r"\s+\((?:see|by|from) [^()]*\)$|"
    r"\s+\((?!\s*(?:mod|approx\w*|about|roughly|nearly|almost|or|not|if|maybe|perhaps|[A-J]\)))"
    r"[A-Za-z][A-Za-z ,'-]*\)$",
    re.IGNORECASE,
)
_CAPTION = re.compile(r"(?!remainder|not\b)[A-Za-z][A-Za-z ]{2,30}:\s+(?=[-\d$\\(])")
_SENTENCE = re.compile(r"(?<=[\d}$)\]])\.\s+(?=[A-Z][a-z]).*$", re.DOTALL)
_ONLY_TEXT = re.compile(r"\\text(?:bf)?\{[^{}]*\}")
_UNUSABLE = re.compile(r"[+-]?nan", re.IGNORECASE)


def normalise(answer: str) -> str:
    """Removes thousands separators, LaTeX commands that only change the appearance, and spaces.

    A space between two digits stays, so ``1 1/2`` and ``11/2`` differ.
    """
    answer = simplify_notation(clean_characters(answer))
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    if "(" not in answer:
        answer = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    answer = _NOISE.sub(" ", answer)
    return re.sub(r"(?<=\d) (?=[\d.])|( )", lambda match: "" if match[1] else " ", answer)


def parse_number(answer: str) -> Fraction | None:
    """Returns the value of a decimal number, a quotient of two, a mixed number or a LaTeX fraction of integers.

    Returns None for other text.
    """
    if match := _SIMPLE_FRACTION.fullmatch(answer):
        return _mixed(match[1], match[2], match[3], match[4])
    if match := _MIXED.fullmatch(answer):
        return _mixed(match[1], match[2], match[3], match[4])
    parts = answer.split("/")
    if len(parts) > 2 or not answer.isascii() or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    if any(abs(int(part.lower().partition("e")[2] or 0)) > _MAX_EXPONENT for part in parts):
        return None
    values = [Fraction(part) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def _mixed(sign: str, whole: str, above: str, below: str) -> Fraction | None:
    if int(below) == 0 or (whole and not 0 < int(above) < int(below)):
        return None
    value = int(whole or 0) + Fraction(int(above), int(below))
    return -value if sign == "-" else value


def usable_truth(ground_truth: str) -> bool:
    """Returns whether an answer can be equal to this right answer: it is neither empty nor NaN."""
    truth = clean_truth(ground_truth)
    return bool(truth) and not _UNUSABLE.fullmatch(truth)


def exact(response: str, ground_truth: str, thinking_end: Sequence[str] = THINKING_END) -> tuple[bool, str | None]:
    """Compares the answer with the right one up to white space; without an answer, compares the whole response.

    Returns:
        Whether they are equal, and the answer.
    """
    extracted = extract(response, thinking_end)
    answer = after_thinking(response, thinking_end) if extracted is None else extracted
    if len(answer) > MAX_ANSWER_CHARACTERS + len(ground_truth):
        return False, answer[:MAX_ANSWER_CHARACTERS]
    expected = " ".join(ground_truth.split())
    return bool(expected) and " ".join(answer.split()) == expected, answer


def math(response: str, ground_truth: str, thinking_end: Sequence[str] = THINKING_END) -> tuple[bool, str | None]:
    """Compares the answer with the right one as text, as a number, and as an expression.

    Returns:
        Whether they are equal, and the answer; None without an answer.
    """
    answer = extract(response, thinking_end)
    if not answer:
        return False, None
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False, answer[:MAX_ANSWER_CHARACTERS]
    if not usable_truth(ground_truth):
        return False, answer
    return equal(answer, clean_truth(ground_truth)), answer


def equal(answer: str, truth: str) -> bool:
    """Returns whether an extracted answer equals a right answer that :func:`clean_truth` returned."""
    answer = clean_answer(answer)
    given, expected = normalise(answer), normalise(truth)
    if given == expected:
        return True
    letter = _CHOICE.fullmatch(_plain(truth))
    if letter and (_plain(truth) != letter[1] or letter[1].isupper()):
        chosen = _CHOICE.fullmatch(_plain(answer))
        if chosen and chosen[1].upper() == letter[1].upper():
            return True
    values = parse_number(given), parse_number(expected)
    if None not in values:
        return values[0] == values[1]
    words = _plain(truth).casefold()
    if len(words) > 1 and words.replace(" ", "").isalpha() and _plain(answer).casefold() == words:
        return True
    if len(truth) > MAX_TRUTH_CHARACTERS:
        return False
    return _by_value(answer, truth)


def _by_value(answer: str, truth: str) -> bool:
    bases = [re.fullmatch(r"\s*([0-9A-Fa-f]+)_\{?\s*\d{1,2}\s*\}?\s*", text.strip("$ ")) for text in (answer, truth)]
    if bases[1] and not bases[0] and normalise(answer).upper() == bases[1][1].upper():
        return True  # the digits without the base that the problem asks for
    if bases[0] and not bases[1]:
        return False
    if _needs_library(answer + truth):
        return _symbolic(answer, truth)
    try:
        return comparison.equal(answer, truth)
    except (ValueError, TypeError, AttributeError, ArithmeticError, NotImplementedError, KeyError, RecursionError):
        return False  # not an expression as a whole, or one that SymPy gives no value


def clean_truth(ground_truth: str) -> str:
    r"""Removes what data sets put around a right answer: ``['2']``, ``#### 5``, ``\boxed{5}``, ``$5$.``, ``5\\``."""
    truth = clean_characters(ground_truth).strip()
    if truth.startswith("[") and truth.endswith("]") and len(truth) < MAX_TRUTH_CHARACTERS:
        try:
            values: Any = ast.literal_eval(truth)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = None
        if isinstance(values, list) and len(values) == 1 and isinstance(values[0], str | int | float):
            truth = str(values[0]).strip()
    truth = truth.removeprefix("####").strip()
    if "answer" in truth.lower():
        truth = extract(truth) or truth
    if (boxed := last_boxed(truth)) is not None and re.match(r"\$*\\f?boxed|\$*\\fbox", truth):
        truth = boxed
    return unwrap(unbox(truth))


def clean_answer(answer: str) -> str:
    """Removes an introduction ("the value is"), trailing remarks and whole sentences after the answer."""
    answer = re.sub(r"\\text(?:bf)?\{([^{}]*)\}", r"\1", answer) if _ONLY_TEXT.fullmatch(answer) else answer
    answer = _SENTENCE.sub("", answer)
    answer = _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer
    answer = _CAPTION.sub("", answer, count=1) if _CAPTION.match(answer) else answer
    answer = _OPTION.sub("", answer) if _OPTION.match(answer) else answer
    for pattern in (_REMARK, _NOTE):
        shorter = pattern.sub("", answer)
        answer = shorter if shorter.strip(" $*") else answer
    return unwrap(answer)


def _plain(text: str) -> str:
    r"""Returns the words of ``\text{...}`` without the command and dollar signs."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textit|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.replace("$", " ").split()).strip(". ")


def _needs_library(text: str) -> bool:
    return bool(re.search(r"\\(?:int|lim|partial)(?![a-z])|\\frac\{d", text))


def _symbolic(answer: str, truth: str) -> bool:
    """Compares integrals, limits and derivatives with math-verify if it parsed both sides whole.

    Its own time-outs are off because the child process is bounded.
    """
    import math_verify  # type: ignore[import-untyped]  # the package ships no type information

    logging.disable(logging.WARNING)
    gold, found = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (truth, answer))
    if not gold or not found or not parsed_whole(truth, gold[0]) or not parsed_whole(answer, found[0]):
        return False
    return bool(math_verify.verify(gold, found, timeout_seconds=None))


def parsed_whole(text: str, parsed: object) -> bool:
    """Returns whether every number, letter and word of a text is found in what was parsed from it."""
    printed = str(parsed)
    text = re.sub(r"\\(?:int|lim|frac|to|infty|pi|cdot|left|right|sin|cos|tan|ln|log|exp|sqrt|[,;:! ])", " ", text)
    if "\\" in text.replace(r"\{", "").replace(r"\}", ""):
        return False
    numbers = {number for number in re.findall(r"\d+", text) if number not in ("0", "1")}
    letters = {letter for letter in re.findall(r"[A-Za-z]", text) if letter not in "de"}
    return all(re.search(rf"(?<!\d){number}(?!\d)", printed) for number in numbers) and all(
        letter in printed for letter in letters
    )
