"""Writes the reference pages that follow from the code: docs/configuration.md and docs/metrics.md.

python -m tools.reference           # writes both
python -m tools.reference --check   # exit code 1, with the differences, where a page is not what would be written

Fields are described by the ``Attributes:`` of their dataclass, metrics by the table of :mod:`.observe.metrics`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fipo_megatron.algorithm.policy_loss_config import KIND_DEFAULTS
from fipo_megatron.config import Config, load_config
from fipo_megatron.observe import metrics

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "examples" / "configs"
MADE_BY = "<!-- Made by `python -m tools.reference`; change the code instead. -->"

_ATTRIBUTE = re.compile(r"(\w+): (.*)")
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
_BAD_VALUES: tuple[Any, ...] = (math.nan, (math.nan, math.nan), -1)


class DescriptionError(ValueError):
    """A field without a description, or a description without a field; the message names each."""


# --- What docstrings say ---


def attributes(docstring: str) -> dict[str, str]:
    """The ``Attributes:`` of a Google docstring: one line of text for each name."""
    found: dict[str, str] = {}
    name = ""
    _, _, section = inspect.cleandoc(docstring).partition("\nAttributes:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        begins = _ATTRIBUTE.fullmatch(line.strip())
        if begins and line.startswith("    ") and not line.startswith("     "):
            name = begins[1]
            found[name] = begins[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def descriptions(of: type) -> dict[str, str]:
    """What the fields of a dataclass mean, inherited ones included.

    Raises:
        DescriptionError: a field has no description, or a description no field.
    """
    found: dict[str, str] = {}
    for base in reversed(of.__mro__):
        if is_dataclass(base):
            found |= attributes(base.__doc__ or "")
    names = {entry.name for entry in fields(of)}
    problems = [f"{of.__name__}.{name}: has no description" for name in sorted(names - found.keys())]
    problems += [f"{of.__name__}.{name}: is described, but is no field" for name in sorted(found.keys() - names)]
    if problems:
        raise DescriptionError("\n".join(problems))
    return found


def markdown(text: str) -> str:
    """From the markup of docstrings to that of the pages, for a cell of a table."""
    text = re.sub(r":\w+:`[~.]?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`").replace("|", "\\|")


# --- What types say ---


def room(entry: Field[Any]) -> type | None:
    """The dataclass of a field that is a room of its own; None of a value."""
    default = entry.default_factory
    return default if isinstance(default, type) and is_dataclass(default) else None


def rooms(of: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every room with its dotted name, outer ones before those inside."""
    yield prefix.rstrip("."), of
    for entry in fields(of):
        inner = room(entry)
        if inner is not None:
            yield from rooms(inner, f"{prefix}{entry.name}.")


def type_text(hint: Any) -> str:
    """A type in words: "integer", "list of text", "`a` or `b`"."""
    if hasattr(hint, "__metadata__"):
        return type_text(hint.__origin__)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        *others, last = (f"`{choice}`" for choice in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {type_text(arguments[0])}"
        return f"[{', '.join(map(type_text, arguments))}]"
    if origin is dict:
        return "mapping"
    if origin is Union or type(hint).__name__ == "UnionType":
        return " or ".join("null" if argument is type(None) else type_text(argument) for argument in arguments)
    return _WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def range_text(hint: Any) -> str:
    """The bounds that a type declares: "≥ 1"; empty where it declares none."""
    bounds = []
    for argument in get_args(hint) if not hasattr(hint, "__metadata__") else ():
        bounds.append(range_text(argument))
    for annotation in getattr(hint, "__metadata__", ()):
        constraints = annotation.metadata if isinstance(annotation, FieldInfo) else [annotation]
        for constraint in constraints:
            bounds += [
                f"{sign} {getattr(constraint, name):g}" for name, sign in _BOUNDS.items() if _has(constraint, name)
            ]
            if _has(constraint, "multiple_of"):
                bounds.append(f"a multiple of {constraint.multiple_of}")
    return ", ".join(filter(None, bounds))


def _has(constraint: Any, name: str) -> bool:
    return getattr(constraint, name, None) is not None


def refusal(of: type, name: str) -> str:
    """What is valid according to the error that a bad value of a field raises; empty where none does."""
    for value in _BAD_VALUES:
        try:
            of(**{name: value})
        except ValidationError as error:
            for line in (line for detail in error.errors() for line in detail["msg"].splitlines()):
                said = re.search(rf"\b{name}: must be (.*), got ", line)
                if said:
                    return said[1].removesuffix(", or null").replace(">=", "≥").replace("<=", "≤")
    return ""


def valid(of: type, entry: Field[Any], hint: Any) -> str:
    """Type and range of a field, as a cell of the table."""
    limits = range_text(hint)
    if not limits and not any(get_origin(part) is Literal for part in (hint, *get_args(hint))):
        limits = refusal(of, entry.name)
    between = ", " if limits[:1] in _BOUNDS.values() else ": "
    return f"{type_text(hint)}{between if limits else ''}{limits}".replace("|", "\\|")


def yaml_text(value: Any) -> str:
    """A value as a configuration file has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f".{value:g}".replace(".-", "-.") if math.isinf(value) else f"{value:.12g}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_text(each)}" for key, each in value.items()) + "}"
    return str(value) if value != "" else '""'


def default(entry: Field[Any]) -> Any:
    """Of a field that has one; every field of a configuration does."""
    if entry.default is not MISSING or entry.default_factory is MISSING:
        return entry.default
    return entry.default_factory()


# --- The pages ---


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their dotted keys."""
    found: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        found |= flat(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {prefix + entry.name: value}
    return found


def _room_section(name: str, of: type) -> list[str]:
    said, hints = descriptions(of), get_type_hints(of, include_extras=True)
    entries = [entry for entry in fields(of) if room(entry) is None]
    if not entries:
        return []
    dotted = f"{name}." if name else ""
    heading = f"## `{name}`" if name else "## Beside the rooms"
    summary = markdown(inspect.cleandoc(of.__doc__ or "").partition("\n\n")[0].replace("\n", " "))
    rows = [
        (
            f'<a id="{dotted}{entry.name}"></a>`{entry.name}`',
            f"`{yaml_text(default(entry))}`",
            valid(of, entry, hints[entry.name]),
            markdown(said[entry.name]),
        )
        for entry in entries
    ]
    lines = [heading, "", *([summary, ""] if name else [])]
    return [*lines, *table(("key", "default", "valid", "meaning"), rows), ""]


def _kinds_section() -> list[str]:
    plain = {f"algorithm.{key}": value for key, value in _defaults("algorithm").items()}
    changed = sorted({f"algorithm.{key}" for kind in KIND_DEFAULTS.values() for key in kind}, key=list(plain).index)
    rows = [
        (
            f"[`{key}`](#{key})",
            *(f"`{yaml_text(kind.get(key.partition('.')[2], plain[key]))}`" for kind in KIND_DEFAULTS.values()),
        )
        for key in changed
    ]
    return [
        "## What `algorithm.kind` changes",
        "",
        "A kind has defaults of its own. What files and overrides say wins over them, and a note at start-up names",
        "every default of the kind that was changed. Other keys of `algorithm` have the same default for all kinds.",
        "",
        *table(("key", *(f"`{kind}`" for kind in KIND_DEFAULTS)), rows),
        "",
    ]


def _defaults(name: str) -> dict[str, Any]:
    of = dict(rooms())[name]
    return {entry.name: default(entry) for entry in fields(of)}


def _presets_section() -> list[str]:
    plain = flat(Config())
    presets = {path.stem: flat(load_config(path)) for path in sorted(PRESETS.glob("*.yaml"))}
    rows = [
        (f"[`{key}`](#{key})", f"`{yaml_text(value)}`", *(f"`{yaml_text(each[key])}`" for each in presets.values()))
        for key, value in plain.items()
        if any(each[key] != value for each in presets.values())
    ]
    return [
        "## Presets",
        "",
        "The files in `examples/configs/`, where they differ from the defaults or from one another.",
        "",
        *table(("key", "default", *(f"`{name}`" for name in presets)), rows),
        "",
    ]


def configuration_page() -> str:
    """docs/configuration.md."""
    named = [(name, of) for name, of in rooms() if name]
    sections = [line for name, of in [*named, ("", Config)] for line in _room_section(name, of)]
    contents = table(
        ("room", "about"),
        (
            (f"[`{name}`](#{name.replace('.', '')})", markdown((of.__doc__ or "").partition("\n")[0]))
            for name, of in named
        ),
    )
    lines = [
        MADE_BY,
        "",
        "# Configuration",
        "",
        "A run is configured by one YAML file and by `key=value` overrides on the command line, values in YAML. A file",
        "may name another with `base:` and then holds only what differs. Unknown keys, wrong types and values, and",
        "what cannot go together are errors before anything expensive starts, all in one message. This prints the",
        "complete configuration, and notes on what is valid but worth knowing:",
        "",
        "```bash",
        "python -m fipo_megatron.config examples/configs/fipo_qwen2.5_32b.yaml rollout.max_response_tokens=16384",
        "```",
        "",
        *contents,
        "",
        *sections,
        *_kinds_section(),
        *_presets_section(),
    ]
    return "\n".join(lines)


FILES = {"evaluation": "evaluation.jsonl", "time": "timing.jsonl", "throughput": "timing.jsonl"}
"""The file that a group of metrics is in, where it is not metrics.jsonl."""


def _metric_rows(found: Iterable[metrics.Metric], *, anchors: bool) -> list[tuple[str, ...]]:
    return [
        (
            (f'<a id="{metric.tag}"></a>' if anchors else "") + f"`{metric.tag}`",
            markdown(metric.text),
            metric.unit,
            markdown(metric.when) or "every step that learns",
        )
        for metric in found
    ]


def metrics_page() -> str:
    """docs/metrics.md."""
    titles = ("tag", "meaning", "unit", "when")
    lines = [
        MADE_BY,
        "",
        "# Metrics",
        "",
        "A tag is the key in a JSON Lines file of `run.output`, and the name in TensorBoard. A value is a number, or",
        "null where it is not finite or does not exist. Nothing in `metrics.jsonl` depends on time, so that equal runs",
        "have equal files; what does is in `timing.jsonl`. Symbols are those of [the algorithm](algorithm.md).",
        "",
    ]
    for group, about in metrics.GROUPS.items():
        found = [metric for metric in metrics.METRICS if metric.group == group]
        if found:
            lines += [f"## {group}", "", f"{markdown(about)} In `{FILES.get(group, 'metrics.jsonl')}`.", ""]
            lines += [*table(titles, _metric_rows(found, anchors=True)), ""]
    lines += ["## Histograms", "", "In TensorBoard alone.", ""]
    lines += [*table(titles, _metric_rows(metrics.HISTOGRAMS, anchors=False)), ""]
    lines += ["## Texts", "", "In TensorBoard alone.", ""]
    lines += [*table(titles, _metric_rows(metrics.TEXTS, anchors=False)), ""]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration_page, "metrics.md": metrics_page}
"""By the name of the file in docs/."""


def stale(docs: Path) -> list[str]:
    """The differences between the pages in a directory and what would be written, as lines of a diff."""
    lines: list[str] = []
    for name, page in PAGES.items():
        path = docs / name
        have = path.read_text(encoding="utf-8") if path.exists() else ""
        lines += difflib.unified_diff(
            have.splitlines(), page().splitlines(), str(path), "would be written", lineterm=""
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pages are (default: docs/)")
    given = parser.parse_args(arguments)
    if given.check:
        differences = stale(given.docs)
        if differences:
            print("\n".join(differences))
            print("not current; `python -m tools.reference` writes them", file=sys.stderr)
        return 1 if differences else 0
    for name, page in PAGES.items():
        (given.docs / name).write_text(page(), encoding="utf-8")
        print(given.docs / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
