r"""Extraction of the answer from a response. The time is linear in the length of the response.

Only the text after the last end tag of thinking counts. In it, the last of these marks that has an answer decides:

- ``Answer: 5`` with any emphasis (``**Answer:** 5``, ``\textbf{Answer}: 5``), or a line ``Answer`` or ``### Answer``;
  the answer stands in the same line or, if nothing follows, in the next line that is not blank;
- ``\boxed{5}``, ``\fbox{5}`` or ``\boxed 5``;
- ``#### 5`` in a line of its own;
- ``<answer>5</answer>``.

A response without them is searched for the last "the answer is 5".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

THINKING_END = ("</think>",)
"""End tags of thinking."""

_WINDOW = 2000
"""Characters after a mark that are searched for its answer."""
_ATTEMPTS = 32
"""Marks without an answer that are passed over, from the last one on."""

_MARK = re.compile(
    r"(?P<answer>(?<![A-Za-z])answer[ \t*_}\"'`]{0,8}[:：=])"
    r"|(?P<header>^[ \t>#*_]{0,12}(?:the[ ])?(?:final[ ])?answer[ \t*_]{0,8}$)"
    r"|(?P<box>\\(?:boxed|fbox|framebox)(?![A-Za-z]))"
    r"|(?P<hash>^[ \t]{0,4}####(?![#]))"
    r"|(?P<tag><answer>)",
    re.IGNORECASE | re.MULTILINE,
)
_PHRASE = re.compile(
    r"\banswer[ \t*_]{1,8}(?:is|are|equals)\b[ \t*_]{0,8}:?"
    r"(?:[ \t]{0,4}(?:therefore|thus|then|simply|just|indeed)\b)?,?",
    re.IGNORECASE,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOXED = re.compile(r"[ \t]{0,4}(-?\d[\d.,/]{0,40})|[ \t]{1,4}(\w)")
_BETWEEN_BOXES = re.compile(r"[\s$,;]{0,8}(?:(?:or|,|;)[\s$]{0,8})")
_HEADING = re.compile(r"\d+[.)]\s+\w|(?<![\\A-Za-z])[A-Za-z]{3,}")
_FIRST_SENTENCE = re.compile(r"(?<=[\w$})\]*>\"'`])[.!?](?=\s+\S)|[。！？]|[!?](?=[\u4e00-\u9fff])")
_BLANK = re.compile(r"[ *_>]*|[ >]*```\w*[ ]*")
"""A blank line, or the beginning of a code block."""
_CLOSER = re.compile(r"^[ \t]*(?:\*\*\*|\*\*|\*|__|_|\}|`|\")(?=\s)")
"""End of the emphasis around the word ``Answer:``."""
_BULLET = re.compile(r"(?:[-*•>][ \t]+){0,3}")
_ENVIRONMENT = re.compile(r"\\begin\{(?:align|aligned|equation|gather|gathered|center|displaymath)(\*?)\}|"
                          r"\\end\{(?:align|aligned|equation|gather|gathered|center|displaymath)(\*?)\}")  # fmt: skip
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("***", "***"), ("**", "**"), ("__", "__"), ("*", "*"),
    ("```", "```"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("<answer>", "</answer>"), ("_", "_"),
)  # fmt: skip
_DECORATION = re.compile(
    r"</?(?:b|i|em|strong|s|p|u|br|span|div)\s?/?>|<\|[a-z_]{1,20}\|>|\\(?:qed|blacksquare|square|Box)(?![A-Za-z])\s*\.?\s*$"
)
_LEADING = re.compile(r"(?:=(?!=)|[→⇒]|\*\*?|__|[`\"}>|:]|[☀-➿\U0001f300-\U0001faff️])\s*")
_TRAILING = re.compile(r"\s*(?:(?<!\^)(?<!\^\{)\*\*?|__|[`\"|;:]|\\\\|[☀-➿\U0001f300-\U0001faff️])$")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = (
    _FULL_WIDTH
    | dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\ufe58\uff0d"), "-")
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad"), "")
    | dict.fromkeys(map(ord, "\u3000\u2000\u2001\u2002\u2003\u2004\u2005\u2007\u2008\u205f\t\r"), " ")
    | {ord("\u2009"): "\u202f", ord("\u00a0"): "\u202f"}
)


def extract(response: str, thinking_end: Sequence[str] = THINKING_END) -> str | None:
    """Returns the unwrapped answer of a response, or None; see the module for the precedence of forms."""
    text = clean_characters(after_thinking(response, thinking_end))
    marks = _marks(text)
    closing = _matching_braces(text, marks[0].start()) if any(mark.lastgroup == "box" for mark in marks) else {}
    for index in range(len(marks) - 1, max(-1, len(marks) - 1 - _ATTEMPTS), -1):
        if found := _answer_at(text, marks, index, closing):
            return found
    for position in sorted((p - 1 for word in ("nswer", "NSWER") for p in _last_positions(text, word)), reverse=True):
        match = _PHRASE.match(text, max(0, position))
        if match and (found := unwrap(_until_sentence_end(_passage(text, match.end())))):
            return found
    return None


def after_thinking(response: str, thinking_end: Sequence[str] = THINKING_END) -> str:
    """Returns what follows the last end tag and is not in an unfinished thought that begins with its start tag."""
    text = response[max((response.rfind(tag) + len(tag) for tag in thinking_end if tag in response), default=0) :]
    for tag in thinking_end:
        if tag.startswith("</"):
            text = text.partition("<" + tag[2:])[0]
    return text


def clean_characters(text: str) -> str:
    """Replaces full-width characters and dashes by ASCII, and removes zero-width characters."""
    return text if text.isascii() and "\t" not in text and "\r" not in text else text.translate(_CHARACTERS)


@dataclass(frozen=True)
class MarkedAnswer:
    r"""An answer with its mark.

    Attributes:
        kind: Kind of the mark: ``answer``, ``header``, ``box``, ``hash`` or ``tag``.
        start: Position of the mark.
        end: Position after the text that was read for the answer.
        text: Unwrapped answer, not empty.
    """

    kind: str
    start: int
    end: int
    text: str


def marked_answers(text: str, most: int) -> list[MarkedAnswer]:
    r"""Returns the answers of all marks in order, each answer once: of ``Answer: \boxed{5}`` that of the box.

    Args:
        text: Cleaned text (:func:`clean_characters`); thinking is not left out.
        most: Largest number of marks of each word, counted from the end.
    """
    marks = _marks(text, most)
    closing = _matching_braces(text, marks[0].start()) if any(mark.lastgroup == "box" for mark in marks) else {}
    found: list[MarkedAnswer] = []
    for index, mark in enumerate(marks):
        start, end = mark.start(), _answer_end(text, mark, closing)
        answer = _answer_at(text, marks, index, closing)
        if answer and mark.lastgroup in ("answer", "header"):
            answer = unwrap(unbox(_CLOSER.sub("", text[mark.end() : end])))
        if answer and mark.lastgroup == "box":
            span = _box_span(text, mark, closing)
            joined = found and found[-1].kind == "box" and span is not None and ", " in answer
            if joined and answer != text[slice(*span or (0, 0))].strip() and _BETWEEN_BOXES.fullmatch(
                text, found[-1].end, start
            ):  # fmt: skip
                start = found.pop().start
        while answer and found and start < found[-1].end:
            start = min(start, found.pop().start)  # a mark within the passage of another
        if answer:
            found.append(MarkedAnswer(str(mark.lastgroup), start, end, answer))
    return found


def _answer_end(text: str, mark: re.Match[str], closing: dict[int, int]) -> int:
    """Returns the position after the first sentence of the text that :func:`_answer_at` reads."""
    if mark.lastgroup == "box":
        span = _box_span(text, mark, closing)
        return mark.end() if span is None else span[1] + (text[span[1] : span[1] + 1] == "}")
    if mark.lastgroup == "tag":
        return text.find("</answer>", mark.end()) + len("</answer>")
    passage = _passage(text, mark.end(), below=mark.lastgroup != "hash")
    start = max(mark.end(), text.find(passage, mark.end()))
    sentence = _FIRST_SENTENCE.search(passage)
    return start + (sentence.end() if sentence else len(passage))


def _marks(text: str, most: int = _ATTEMPTS) -> list[re.Match[str]]:
    """Returns the last marks of each kind in their order. Searching words is faster than matching at each character."""
    boxes = (r"\boxed", r"\fbox", r"\framebox")
    starts = {position for word in boxes for position in _last_positions(text, word, most)}
    for word in ("nswer", "NSWER", "####"):
        for position in _last_positions(text, word, most):
            line = text.rfind("\n", max(0, position - 40), position) + 1
            starts |= {max(0, position - 1), max(0, position - 2), line}
    found = (_MARK.match(text, start) for start in sorted(starts))
    return [match for match in found if match is not None]


def _last_positions(text: str, word: str, most: int = _ATTEMPTS) -> list[int]:
    """Returns the positions of the last occurrences of a word, the last one first."""
    found: list[int] = []
    position = text.rfind(word)
    while position >= 0 and len(found) <= most:
        found.append(position)
        position = text.rfind(word, 0, position)
    return found


def unwrap(answer: str) -> str:
    """Removes dollar signs, brackets, boxes, emphasis, bullets and punctuation around an answer."""
    answer = _DECORATION.sub(" ", _ENVIRONMENT.sub(" ", clean_characters(answer))).strip()
    for _ in range(40):
        before = answer
        if (match := _LEADING.match(answer)) and not (answer.startswith("|") and answer.count("|") % 2 == 0):
            pair = next((r for le, r in _WRAPPERS if answer.startswith(le) and answer.endswith(r)), None)
            answer = answer if pair and len(answer) > 2 * len(pair) else answer[match.end() :]
        match = _TRAILING.search(answer[-8:])
        if match and not (answer.endswith("|") and answer.count("|") % 2 == 0):
            pair = next((r for le, r in _WRAPPERS if answer.startswith(le) and answer.endswith(r)), None)
            answer = answer if pair else answer[: len(answer) - len(match[0])]
        if answer.endswith((".", ",", "。")) and not answer.endswith(("dots.", "...")):
            answer = answer[:-1].rstrip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            enclosed = len(answer) > len(left) + len(right) and answer.startswith(left) and answer.endswith(right)
            if enclosed and left not in inner and right not in inner:
                answer = inner.strip()
        if answer.count("$") % 2 and not answer.startswith(r"\$"):  # a dollar sign without its partner
            answer = answer.removeprefix("$") if answer.startswith("$") else answer.removesuffix("$")
        answer = answer.strip()
        if answer == before:
            break
    return "" if not answer.strip("$*_`|{}\\ ") and answer != r"\{\}" else answer


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last ``\boxed{...}`` or ``\fbox{...}`` whose braces are balanced."""
    marks = [match for match in _marks(text) if match.lastgroup == "box"]
    closing = _matching_braces(text, marks[0].start()) if marks else {}
    for match in marks[: -_ATTEMPTS - 1 : -1]:
        if (span := _box_span(text, match, closing)) is not None:
            return text[span[0] : span[1]]
    return None


def _matching_braces(text: str, start: int = 0) -> dict[int, int]:
    """Returns the position of the closing brace for that of each opening one, in one pass."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _box_span(text: str, mark: re.Match[str], closing: dict[int, int]) -> tuple[int, int] | None:
    start = mark.end()
    while start < len(text) and text[start] == " " and start < mark.end() + 4:
        start += 1
    if text[start : start + 1] == "{":
        return (start + 1, closing[start]) if start in closing else None
    bare = _BARE_BOXED.match(text, mark.end())
    return bare.span(bare.lastindex or 0) if bare else None


def _answer_at(text: str, marks: Sequence[re.Match[str]], index: int, closing: dict[int, int]) -> str:
    """Returns the answer that belongs to a mark; empty without one."""
    mark = marks[index]
    if mark.lastgroup == "box":
        line = text.rfind("\n", max(0, mark.start() - _WINDOW), mark.start())
        owner = next(
            (m for m in marks[max(0, index - 8) : index] if m.lastgroup == "answer" and m.start() > line), None
        )
        if owner is not None and re.search(r"\b(?:or|and)\b|[,;]\s*$", text[owner.end() : mark.start()]):
            found = unwrap(unbox(_passage(text, owner.end()), keep=True))  # one of several answers
            if not _HEADING.search(found.replace(" or ", "").replace(" and ", "")):
                return found
        return unwrap(_boxes(text, marks, index, closing))
    if mark.lastgroup == "tag":
        content, closed, _ = text[mark.end() : mark.end() + _WINDOW].partition("</answer>")
        return unwrap(unbox(content)) if closed else ""
    passage = _CLOSER.sub("", _passage(text, mark.end(), below=mark.lastgroup != "hash"))
    if mark.lastgroup == "hash" and _HEADING.search(passage):
        return ""
    return unwrap(unbox(passage))


def _boxes(text: str, marks: Sequence[re.Match[str]], index: int, closing: dict[int, int]) -> str:
    r"""Returns the content of a box; with boxes before it that only ``or`` or a comma separates, of all."""
    span = _box_span(text, marks[index], closing)
    if span is None:
        return ""
    found, start = [text[span[0] : span[1]]], marks[index].start()
    for mark in reversed(marks[max(0, index - 8) : index]):
        before = _box_span(text, mark, closing) if mark.lastgroup == "box" else None
        if before is None or not _BETWEEN_BOXES.fullmatch(text, before[1] + 1, start):
            break
        found.append(text[before[0] : before[1]])
        start = mark.start()
    return ", ".join(reversed(found))


def unbox(passage: str, *, keep: bool = False) -> str:
    r"""Replaces each ``\boxed{x}`` by ``x``; of a single one, returns only the content unless ``keep``."""
    if "box" not in passage:
        return passage
    closing = _matching_braces(passage)
    marks = [match for match in _MARK.finditer(passage) if match.lastgroup == "box"]
    spans = [(mark.start(), span) for mark in marks if (span := _box_span(passage, mark, closing)) is not None]
    if not spans:
        return passage
    if len(spans) == 1 and not keep:
        return passage[slice(*spans[0][1])]
    pieces, position = [], 0
    for start, (left, right) in spans:
        if start >= position:
            pieces += [passage[position:start], passage[left:right]]
            position = right + 1
    return "".join(pieces) + passage[position:]


def _passage(text: str, start: int, *, below: bool = True) -> str:
    """Returns the rest of the line, or the next line that is not blank; more lines if a formula goes on in them."""
    lines = text[start : start + _WINDOW].split("\n")
    first = 0
    if not lines[0].strip(" *_}\"'`|:#") and below:
        first = next((n for n in range(1, len(lines)) if not _BLANK.fullmatch(lines[n])), len(lines))
        if first < len(lines):
            lines[first] = lines[first][_bullet_end(lines[first]) :]
    if lines[0].lstrip(" *_}\"'`|:#").startswith("$$") and len(lines[0].strip(" *_}$")) == 0 and len(lines) == 1:
        return ""
    for end in range(first + 1, min(len(lines), first + 20) + 1):
        passage = "\n".join(lines[first:end])
        if _complete(passage):
            return passage
    return lines[first] if first < len(lines) else ""


def _bullet_end(line: str) -> int:
    match = _BULLET.match(line.lstrip())
    return len(line) - len(line.lstrip()) + (match.end() if match else 0)


def _complete(passage: str) -> bool:
    """Returns whether no formula, group or environment is left open."""
    return (
        passage.count("{") <= passage.count("}")
        and passage.count(r"\[") <= passage.count(r"\]")
        and passage.count("$$") % 2 == 0
        and passage.count(r"\begin") <= passage.count(r"\end")
    )


def _until_sentence_end(passage: str) -> str:
    return re.split(r"\.\s|\.$|\n", passage.strip(), maxsplit=1)[0]
