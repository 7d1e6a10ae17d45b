"""Names of the package, by parsing it: modules, classes with their members, functions and constants."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_ARGUMENTS = re.compile(r"\([^()]*\)")
_CAMEL_CASE = re.compile(r"(?:[A-Z][a-z0-9]+){2,}|[A-Z]+[a-z]\w*[A-Z]\w*")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_FILES = ("html", "json", "jsonl", "md", "parquet", "png", "py", "safetensors", "toml", "txt", "yaml")
_BASES = ("Protocol", "object", "ABC", "NamedTuple", "Generic", "Enum")
"""Bases of other packages without members that a page would name."""


@dataclass
class Names:
    """Members by name of a module or class.

    Attributes:
        modules: Top-level names and submodules, by name of the module without and with its packages.
        classes: Members by class: methods, fields and attributes that a method sets; None if a base is of another
            package.
        callables: Names of functions, classes and methods.
    """

    modules: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    classes: dict[str, set[str] | None] = field(default_factory=dict)
    callables: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, package: Path) -> Names:
        """Parses every module below a directory."""
        names, bases = cls(), defaultdict(set)
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = set(_assigned(tree.body))
            for node in tree.body:
                if isinstance(node, _FUNCTIONS):
                    names.callables.add(node.name)
                elif isinstance(node, ast.ClassDef):
                    names._add_class(node, bases)
                elif isinstance(node, ast.ImportFrom):
                    found |= {alias.asname or alias.name for alias in node.names}
            for start in range(len(parts)):
                names.modules[".".join(parts[start:])] |= found
                if start < len(parts) - 1:
                    names.modules[".".join(parts[start:-1])].add(parts[-1])
        for name in names.classes:
            names.classes[name] = names._members(name, bases, frozenset())
        return names

    def _add_class(self, node: ast.ClassDef, bases: dict[str, set[str]]) -> None:
        found = self.classes.setdefault(node.name, set())
        found |= set(_assigned(node.body))
        for method in node.body:
            if isinstance(method, _FUNCTIONS):
                self.callables.add(method.name)
                found |= {
                    one.attr
                    for one in ast.walk(method)
                    if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self"
                }
        self.callables.add(node.name)
        bases[node.name] |= {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases}

    def _members(self, name: str, bases: dict[str, set[str]], below: frozenset[str]) -> set[str] | None:
        found = self.classes[name]
        for base in bases[name] - below - {name}:
            if base in _BASES:
                continue
            inherited = self._members(base, bases, below | {name}) if base in self.classes else None
            found = None if found is None or inherited is None else found | inherited
        return found

    def unknown(self, words: Iterable[str], elsewhere: Iterable[str] = (), sections: Iterable[str] = ()) -> list[str]:
        """Returns the names among the words that the package should have and has not.

        These are dotted names that begin with a class or module of the package, calls, and names in CamelCase; without
        names that begin with one of ``elsewhere`` or, not being calls, with one of ``sections``.
        """
        wrong = []
        for word in words:
            name = _ARGUMENTS.sub("", word)
            if not _DOTTED.fullmatch(name) or word in elsewhere:
                continue
            first, *rest = name.split(".")
            if first in elsewhere or first in sections or (rest and rest[-1] in _FILES):
                continue
            if not self._exists(first, rest, name != word):
                wrong.append(word)
        return wrong

    def _exists(self, first: str, rest: list[str], called: bool) -> bool:
        if first in self.classes:
            members = self.classes[first]
            return not rest or members is None or rest[0] in members
        if first in self.modules and rest:
            if rest[0] not in self.modules[first]:
                return False
            return self._exists(rest[0], rest[1:], called)
        known = first in self.modules or first in self.callables
        return known or not (called or _CAMEL_CASE.fullmatch(first))


def _assigned(body: list[ast.stmt]) -> Iterable[str]:
    """Yields the names that a module or class body defines."""
    for node in body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (ast.unparse(one) for one in getattr(target, "elts", [target]))
