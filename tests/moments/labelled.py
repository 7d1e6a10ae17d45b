"""Texts labelled by hand: the right answer, the candidates with their verdicts, and whether a reflection is between.

A record begins with ``=== TRUTH | VALUE R; VALUE W | strict``; a text without a candidate has ``-``. The word strict
belongs to Oops and Aha only: from the first right candidate, or the first one, to the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "labelled_texts.txt"


@dataclass(frozen=True)
class Labelled:
    """A text with its labels."""

    text: str
    truth: str
    values: tuple[str, ...]
    right: tuple[bool, ...]
    strict: bool

    @property
    def oops(self) -> bool:
        return len(self.right) > 1 and any(self.right[:-1]) and not self.right[-1]

    @property
    def aha(self) -> bool:
        return len(self.right) > 1 and not self.right[0] and self.right[-1]


def read() -> list[Labelled]:
    """Returns all labelled texts."""
    found = []
    for record in FILE.read_text(encoding="utf-8").split("=== ")[1:]:
        head, _, text = record.partition("\n")
        truth, labels, *strict = (part.strip() for part in head.split(" | "))
        pairs = [] if labels == "-" else [part.strip().rsplit(" ", 1) for part in labels.split(";")]
        assert all(verdict in "RW" for _, verdict in pairs), head
        values, right = tuple(value for value, _ in pairs), tuple(verdict == "R" for _, verdict in pairs)
        found.append(Labelled(text.removesuffix("\n"), truth, values, right, strict == ["strict"]))
    return found
