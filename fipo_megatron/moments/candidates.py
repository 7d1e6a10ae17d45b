r"""Candidates for the final answer of a response, in order of appearance, thinking included.

Three built-in extractors find them: ``boxed`` (``\boxed{5}``), ``answer`` (``Answer: 5``, ``#### 5``,
``<answer>5</answer>``) and ``phrase`` ("the answer is 5", 答案是5). The marks are those of the verifiers
(:mod:`.reward.extraction`), but all of them count, not only the last one. What only mentions an answer is left out: a
question, a quotation, a condition, a placeholder. The words for this are in ``phrases.json``, by language.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fipo_megatron.reward.extraction import clean_characters, marked_answers, unbox, unwrap

BUILT_IN = ("boxed", "answer", "phrase")
LANGUAGES = ("en", "zh")
PHRASES = Path(__file__).parent / "phrases.json"

_MOST = 1000
_WINDOW = 200
"""Characters before a mark that are searched for what makes it no statement."""
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[!?](?=[\u4e00-\u9fff])|[。！？;；\n]|,(?!\d)|，")
_SENTENCE_START = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s|[。！？\n]")
_MATHEMATICS = re.compile(
    r"[\d\\$π∞√]|^[A-Za-z]$|^\(?[A-J]\)?$|^(?:yes|no|true|false|none|zero|one|two|three)$", re.IGNORECASE
)
_SPACE = re.compile(r"[ \t]*")
_WORDS = re.compile(r"[A-Za-z]{2,}")
_MOST_WORDS = 8
_VARIABLE = re.compile(r"[a-z](?:/[a-z])?")
_REPORT = re.compile(r"\W{0,3}\w+ (?:said|says|wrote|writes|claimed|claims|shouted|answered)\b")
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"), ("‘", "’"))
_ADVERBS = re.compile(
    r"(?:therefore|thus|then|simply|just|indeed|actually|really|still|clearly|definitely|now|again)\b[, ]*",
    re.IGNORECASE,
)

Extractor = Callable[[str], Iterable[tuple[int, int, str]]]
"""Takes a response and returns start, end and text of each candidate in order of appearance."""


@dataclass(frozen=True)
class Candidate:
    """A candidate for the final answer.

    Attributes:
        start: Position of its mark in the cleaned response.
        end: Position after the answer.
        text: The answer without its mark.
        surface: The answer with its mark.
    """

    start: int
    end: int
    text: str
    surface: str


@dataclass(frozen=True)
class Phrases:
    """The phrases of some languages.

    Attributes:
        answer: Patterns after which an answer stands.
        reflection: Pattern of phrases with which a response doubts what it has written.
        hypothetical: Pattern of text directly before a mark that makes it a condition, a report or an example.
        instruction: Pattern of a sentence that says how to write the answer.
        not_values: Pattern at the beginning of what follows a mark if it is no answer.
        placeholders: Pattern of a whole answer that is a placeholder.
    """

    answer: re.Pattern[str]
    reflection: re.Pattern[str]
    hypothetical: re.Pattern[str]
    instruction: re.Pattern[str]
    not_values: re.Pattern[str]
    placeholders: re.Pattern[str]

    @classmethod
    def read(cls, languages: Sequence[str] = LANGUAGES, file: Path = PHRASES) -> Phrases:
        """Reads the phrases of the languages.

        Raises:
            ValueError: The file does not have a language, or a pattern is invalid.
        """
        values = json.loads(file.read_text(encoding="utf-8"))
        known = [name for name in values if name != "placeholders"]
        if unknown := [name for name in languages if name not in known]:
            raise ValueError(f"languages = {unknown[0]}: must be of {', '.join(known)}, the languages of {file}")

        def joined(kind: str) -> re.Pattern[str]:
            patterns = [pattern for name in languages for pattern in values[name][kind]]
            return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)

        try:
            placeholders = re.compile(values["placeholders"], re.IGNORECASE)
            return cls(
                joined("answer"),
                joined("reflection"),
                joined("hypothetical"),
                joined("instruction"),
                joined("not_values"),
                placeholders,
            )
        except re.error as error:
            raise ValueError(f"{file}: a pattern is invalid: {error}") from None


@cache
def default_phrases() -> Phrases:
    """Returns the phrases of all built-in languages."""
    return Phrases.read()


@dataclass(frozen=True)
class CandidateExtractor:
    """Finds the candidates of a response.

    Attributes:
        kinds: Built-in extractors, of ``boxed``, ``answer`` and ``phrase``.
        function: An extractor of the task, used in their place; None: the built-in ones.
        phrases: Phrases of the languages.
    """

    kinds: tuple[str, ...] = BUILT_IN
    function: Extractor | None = None
    phrases: Phrases = field(default_factory=default_phrases)

    @classmethod
    def named(cls, name: str, phrases: Phrases | None = None) -> CandidateExtractor:
        """Returns the extractor of a name: built-in ones, separated by commas, or ``python:MODULE.FUNCTION``.

        Raises:
            ValueError: The name is not valid.
        """
        phrases = phrases or default_phrases()
        if name.startswith("python:"):
            module, _, function = name.removeprefix("python:").rpartition(".")
            try:
                return cls((), getattr(importlib.import_module(module), function), phrases)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"extractor = {name}: cannot be imported: {error}") from None
        kinds = tuple(part.strip() for part in name.split(","))
        if wrong := [kind for kind in kinds if kind not in BUILT_IN]:
            raise ValueError(f"extractor = {wrong[0]}: must be of {', '.join(BUILT_IN)}, or python:MODULE.FUNCTION")
        return cls(kinds, None, phrases)

    def __call__(self, response: str) -> tuple[str, list[Candidate]]:
        """Returns the cleaned response and its candidates in order of appearance."""
        text = clean_characters(response)
        if self.function is not None:
            given = [Candidate(start, end, value, text[start:end]) for start, end, value in self.function(text)]
            return text, given
        found = self._marked(text) if {"boxed", "answer"} & set(self.kinds) else []
        if "phrase" in self.kinds:
            found = _merged(found, self._phrases(text, found))
        return text, found

    def _marked(self, text: str) -> list[Candidate]:
        found = []
        for answer in marked_answers(text, _MOST):
            kind = "boxed" if answer.kind == "box" else "answer"
            candidate = Candidate(answer.start, answer.end, answer.text, text[answer.start : answer.end])
            if kind in self.kinds and self._is_statement(text, candidate):
                found.append(candidate)
        return found

    def _phrases(self, text: str, marked: Sequence[Candidate]) -> list[Candidate]:
        """Returns the answers after "the answer is"; a marked answer in the same sentence is its own candidate."""
        found = []
        for match in self.phrases.answer.finditer(text):
            begin = _after(_SPACE, text, match.end())
            begin = _after(_ADVERBS, text, begin)
            end = _sentence_end(text, begin)
            if any(match.start() < one.end and one.start < end for one in marked):
                continue
            value = unwrap(unbox(text[begin:end]))
            candidate = Candidate(match.start(), end, value, text[match.start() : end])
            if value and _MATHEMATICS.search(value) and self._is_statement(text, candidate):
                found.append(candidate)
        return found

    def _is_statement(self, text: str, candidate: Candidate) -> bool:
        """Returns whether the response states this answer, and does not ask, quote or suppose it."""
        value, phrases = candidate.text, self.phrases
        if not value.strip() or phrases.placeholders.fullmatch(value) or phrases.not_values.match(value):
            return False
        if len(_WORDS.findall(value)) > _MOST_WORDS:
            return False
        before = text[max(0, candidate.start - _WINDOW) : candidate.start]
        sentence = _SENTENCE_START.split(before)[-1]
        if phrases.hypothetical.search(sentence):
            return False
        if _VARIABLE.fullmatch(value) and phrases.instruction.search(sentence):
            return False
        rest = text[candidate.end : candidate.end + 3].lstrip(" $*)\"'”")
        if rest.startswith(("?", "？")) or value.endswith(("?", "？")):
            return False
        return not _is_quoted(text, candidate)


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Returns the position after what a pattern matches at ``start``; ``start`` if it does not match."""
    match = pattern.match(text, start)
    return match.end() if match else start


def _sentence_end(text: str, start: int) -> int:
    """Returns the end of the answer that begins at ``start``: that of its clause."""
    for opener, closer in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opener, start):
            end = text.find(closer, start + len(opener))
            if 0 <= end < start + _WINDOW:
                return end + len(closer)
    match = _SENTENCE_END.search(text, start)
    return match.start() if match else len(text)


def _is_quoted(text: str, candidate: Candidate) -> bool:
    """Returns whether a candidate stands in quotation marks that begin within a line, after other text."""
    line = text.rfind("\n", 0, candidate.start) + 1
    before, after = text[line : candidate.start], text[candidate.start : candidate.start + _WINDOW].split("\n")[0]
    for left, right in _QUOTES:
        opened = before.count(left) % 2 == 1 if left == right else before.rfind(left) > before.rfind(right)
        told_before = bool(before[: before.rfind(left)].strip())
        if opened and right in after and (told_before or _REPORT.match(after, after.find(right) + 1)):
            return True
    return before.endswith(" '") and "'" in after


def _merged(one: Sequence[Candidate], other: Sequence[Candidate]) -> list[Candidate]:
    return sorted((*one, *other), key=lambda candidate: (candidate.end, candidate.start))


def snippet(candidate: Candidate, verifier: str) -> str:
    r"""Returns the text of which a verifier judges a candidate.

    ``math`` and ``exact`` are given the answer in a box, if its braces are balanced, else after ``Answer:``. Other
    verifiers are given the answer with its own mark.
    """
    if verifier not in ("math", "exact"):
        return candidate.surface
    balanced = candidate.text.count("{") == candidate.text.count("}") and "\n" not in candidate.text
    return rf"\boxed{{{candidate.text}}}" if balanced else f"Answer: {candidate.text}"
