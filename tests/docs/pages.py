"""The pages of the documentation, their fenced blocks and code spans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the text behind the fence, its content, and the line of the page on which that begins."""

    info: str
    text: str
    line: int

    @property
    def title(self):
        found = re.search(r'title="([^"]*)"', self.info)
        return found[1] if found else ""


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [Block(m["info"], m["text"], text[: m.start()].count("\n") + 1) for m in _FENCE.finditer(text)]


def prose(page):
    """Returns the page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page):
    """Returns the code spans outside fenced blocks."""
    return [re.sub(r"\s+", " ", match[2]).strip() for match in _SPAN.finditer(prose(page))]


def titled(name, title):
    """Returns the only block of a page with this title."""
    (found,) = [block for block in blocks(ROOT / "docs" / name) if block.title == title]
    return found.text
