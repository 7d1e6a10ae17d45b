"""The files of a stress run: stress.json, a page without network access, and a picture."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fipo_megatron.storage.atomic import write_atomic
from fipo_megatron.stress.stress_text import sections

_STYLE = """\
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
.violated { color: #b00020; }
"""


def write_results(directory: Path, data: Mapping[str, Any]) -> Path:
    """Writes stress.json and returns its path."""
    path = directory / "stress.json"
    write_atomic(path, json.dumps(data, indent=1) + "\n")
    return path


def write_report(directory: Path, data: Mapping[str, Any]) -> list[Path]:
    """Writes stress.json, stress.html and, if matplotlib is installed, stress.png; returns their paths."""
    paths = [write_results(directory, data)]
    picture = None
    if importlib.util.find_spec("matplotlib") is not None:
        from fipo_megatron.stress.stress_picture import draw

        if (picture := draw(data)) is not None:
            paths.append(directory / "stress.png")
            write_atomic(paths[-1], picture)
    paths.append(directory / "stress.html")
    write_atomic(paths[-1], page(data, picture))
    return paths


def page(data: Mapping[str, Any], picture: bytes | None) -> str:
    """Returns the page: head, violated limits, picture and tables; it has no script and loads nothing."""
    parts = [f"<h1>fipo stress: {html.escape(str(data['model']))}</h1>", f"<p>{html.escape(_head(data))}</p>"]
    parts += [f'<p class="violated">{html.escape(sentence)}</p>' for sentence in data.get("violations", ())]
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        parts.append(f'<img alt="Curves of the tables below" src="data:image/png;base64,{encoded}">')
    parts += [f"<h2>{html.escape(title)}</h2>{_table(rows)}" for title, rows in sections(data) if rows]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fipo stress</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    sizes = {name: size for name, size in data["layout"].items() if size not in (1, False)}
    layout = ", ".join(f"{name} = {size}" for name, size in sizes.items()) or "no model parallelism"
    lengths = "of full length" if data["median"] is None else f"log-normal with a median of {data['median']:,} tokens"
    return (
        f"{data['config']} {' '.join(data['overrides'])}: {data['ranks']} rank(s), {layout}, {data['device']}, "
        f"prompts of {data['prompt_tokens']} tokens, responses {lengths}."
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
