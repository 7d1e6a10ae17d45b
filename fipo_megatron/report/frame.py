"""The frame of all HTML pages: one file with style, scripts and data that makes no network request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent / "page"
_COMMON = "base.js"
"""The script of every page; it comes first."""
_MARK = re.compile(r"@@([A-Z]+)@@")


def assemble(title: str, body: Path, scripts: Sequence[Path], data: Mapping[str, Any]) -> str:
    """Returns a self-contained page.

    Args:
        title: Title of the page, plain text without markup.
        body: The sections of the page. A link at the top leads to each of them, with the name in its ``data-name``.
            ``@@RESPONSES@@`` is the place of the token view, which needs ``tokens.js``.
        scripts: Scripts of the page.
        data: JSON values that the scripts read. ``runs`` is required; the time is added.
    """
    style = _text(PARTS / "style.css")
    script = "\n".join(_text(path) for path in (PARTS / _COMMON, *scripts))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    made = {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    sections = _filled(_text(body), {"RESPONSES": _text(PARTS / "responses.html").rstrip("\n")})
    parts = {"TITLE": title, "POLICY": policy, "STYLE": style, "BODY": sections, "SCRIPT": script}
    return _filled(_text(PARTS / "frame.html"), parts | {"DATA": escaped_json(made | dict(data))})


def _text(file: Path) -> str:
    return file.read_text("utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Puts the parts into the places of their names; the parts themselves are not searched."""
    return _MARK.sub(lambda mark: parts[mark[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def escaped_json(data: Any) -> str:
    """Returns ASCII JSON without <, > and &, so that it can neither end a script element nor begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
