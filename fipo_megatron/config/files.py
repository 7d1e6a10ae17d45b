"""Reads a configuration from YAML files and dotted overrides, and describes its errors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fipo_megatron.algorithm.policy_loss_config import KIND_DEFAULTS
from fipo_megatron.config.actor_sections import IMPORTANCE_CAP
from fipo_megatron.config.renamed_keys import take_renamed
from fipo_megatron.config.schema import Config

_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 50


class ConfigError(ValueError):
    """An invalid configuration; the message names every key at fault, its value and what would be valid."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies overrides and checks the result.

    Args:
        path: The file; its ``base:`` chain is read first.
        overrides: Items ``key.path=value`` with the value in YAML: ``algorithm.weight_clip=[0.8,1.2]``.

    Raises:
        ConfigError: A file cannot be read, or values are not valid; the message has every problem.
    """
    values = _read(Path(path), seen=())
    for override in overrides:
        values = _merge(values, _parse_override(override))
    if problems := _text_problems(values):
        raise ConfigError(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
    values = {name: {} if value is None else value for name, value in values.items()}  # an empty section is None
    algorithm = values.get("algorithm", {})
    kind = str(algorithm.get("kind", "fipo")) if isinstance(algorithm, dict) else "fipo"
    values, problems = take_renamed(values, kind)
    values = _merge({"algorithm": KIND_DEFAULTS.get(kind, {}) | _staleness_defaults(values, kind)}, values)
    try:
        # Strict validation takes the arrays of JSON for tuples, but not Python's lists.
        config = TypeAdapter(Config).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems += [line for detail in error.errors() for line in _explain(detail)]
    if problems:
        raise ConfigError(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
    return config


def _text_problems(value: Any, location: str = "", inside: tuple[int, ...] = ()) -> list[str]:
    """Lists keys that are not text, texts that no file name or file can hold, and values that contain themselves."""
    if isinstance(value, str):
        held = "a null byte" if "\0" in value else "a lone surrogate" if _SURROGATE.search(value) else ""
        return [f"{location} = {value!r:.200}: holds {held}"] if held else []
    if not isinstance(value, dict | list):
        return []
    if id(value) in inside or len(inside) > _DEEPEST:
        return [f"{location}: is nested too deeply, or in itself"]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    problems = []
    for key, item in items:
        name = f"{location}.{key}".lstrip(".")
        if isinstance(value, dict) and not isinstance(key, str):
            problems.append(f"{name}: the key {key!r:.200} is not text")
        problems += _text_problems(item, name, (*inside, id(value)))
    return problems


def _staleness_defaults(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns defaults of the loss if responses may be older than the weights."""
    if kind == "sft":
        return {}
    rollout = values.get("rollout", {})
    staleness = rollout.get("max_staleness") if isinstance(rollout, dict) else None
    return {"importance_cap": IMPORTANCE_CAP} if isinstance(staleness, int) and staleness > 0 else {}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 and inf as numbers and off as a word, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


# As in YAML 1.2, only true and false are booleans; off is a valid choice of some fields.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|[-+]?\.?inf$"),
    list("-+.0123456789i"),
)


def _load_yaml(text: str) -> Any:
    """Parses YAML.

    Raises:
        ValueError: The text is not valid YAML, nested too deeply, or holds a value that Python cannot.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(str(error)) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: holds a null byte")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the files name each other in a circle: {[p.name for p in seen]}")
    try:
        values = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, got {type(values).__name__}")
    base = values.pop("base", None)
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), values) if base else values


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, as in algorithm.half_life=32")
    try:
        parsed: Any = _load_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the complete configuration as nested dictionaries of JSON values: lists, not tuples."""
    found: dict[str, Any] = json.loads(json.dumps(TypeAdapter(Config).dump_python(config, mode="json"), default=str))
    return found


def keys(of: type = Config, prefix: str = "") -> list[str]:
    """Lists every valid dotted key, sections included."""
    found = []
    for entry in fields(of):
        found.append(prefix + entry.name)
        default = entry.default_factory
        if isinstance(default, type) and is_dataclass(default):
            found += keys(default, f"{prefix}{entry.name}.")
    return found


def _explain(detail: Any) -> list[str]:
    """Describes one pydantic error; a check of this package may have found several problems, a line each."""
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        begins = [key for key in keys() if key.startswith(location)]
        near = begins or difflib.get_close_matches(location, keys(), n=1, cutoff=0.6)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f"; see {location.rpartition('.')[0] or 'the sections'}: "
            + (", ".join(key for key in keys() if key.rpartition(".")[0] == location.rpartition(".")[0]))
        )
        return [f"{location} = {detail['input']!r}: unknown key{hint}"]
    if detail["type"] == "value_error":
        lines = str(detail["ctx"]["error"]).splitlines()
        return [f"{location}.{line}" if location else line for line in lines]
    message = detail["msg"].replace("Input should be", "must be")
    return [f"{location} = {detail['input']!r}: {message[0].lower()}{message[1:]}"]
