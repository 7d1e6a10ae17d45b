"""Reads JSON files that come from outside, and describes what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """Returns the text of an error as a single line of at most ``longest`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]} …"


def parse_json(content: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: The content is not UTF-8, not JSON or nested too deeply; the message is one line without a name.
    """
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {one_line(error)}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read, or holds something else; the message is one line and names the file.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
