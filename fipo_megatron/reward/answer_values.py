"""Answers as values: numbers with units, lists, tuples, sets, intervals and equations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fipo_megatron.reward.equality import same_value
from fipo_megatron.reward.expressions import Parser
from fipo_megatron.reward.latex_tokens import Token, UnreadableError, simplify_notation, tokenize
from fipo_megatron.reward.units import MULTIPLIERS, Unit, read_unit

_RELATIONS = {"=": "=", "<": "<", ">": ">", "leq": "<=", "geq": ">=", "equiv": "=", "neq": "!=", "in": "in"}
_CONDITION = re.compile(
    r"[,;]?\s*(?:\\ \s*)?(?:\(\s*)?(?:\\text\s*\{\s*(?:where|for|with)?\s*\}|where|for|with)?\s*"
    r"(?<![A-Za-z\\])[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\\in\s*(?:\\mathbb\s*\{?\s*[ZNRQC]\s*\}?|\\?[ZNRQ])(?:\^?[+*]|_\{?\\?\w+\}?)?\s*\)?$"
)


@dataclass(frozen=True)
class Scalar:
    """An expression, with a unit or as a percentage."""

    value: Any
    unit: Unit | None = None
    percent: bool = False


@dataclass(frozen=True)
class Collection:
    """Several answers in brackets: ``list`` without any, ``set``, or a tuple with brackets such as ``[)``."""

    kind: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Relation:
    """Sides of an equation or inequality, and the signs between them."""

    sides: tuple[Any, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class RealSet:
    """A set of real numbers."""

    value: Any


@dataclass
class _Groups:
    """A token list split at its top level."""

    parts: list[list[Token]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)


def read(text: str) -> Any:
    """Parses an answer as a whole.

    Raises:
        UnreadableError: The text, or a part of it, is not understood.
    """
    text = _CONDITION.sub("", simplify_notation(text))
    tokens = tokenize(text)
    if any(token in (("command", "pm"), ("command", "mp")) for token in tokens):
        variants = _flat(_read_list(tokens, sign=1)) + _flat(_read_list(tokens, sign=-1))
        return Collection("list", tuple(variants))
    return _read_list(tokens, sign=1)


def _flat(value: Any) -> list[Any]:
    return list(value.items) if isinstance(value, Collection) and value.kind == "list" else [value]


def _split(tokens: list[Token], separators: frozenset[Token]) -> _Groups:
    """Splits at separators outside of brackets."""
    groups, depth, environments = _Groups(), 0, 0
    for token in tokens:
        kind, text = token
        if kind in ("symbol", "command"):
            environments += (text == "begin") - (text == "end")
            depth += (text in ("(", "[", "{", "langle")) - (text in (")", "]", "}", "rangle"))
        if token in separators and not depth and not environments:
            groups.parts.append([])
            groups.separators.append(text)
        else:
            groups.parts[-1].append(token)
    return groups


_COMMAS = frozenset(
    {("symbol", ","), ("symbol", ";"), ("word", "and"), ("word", "or"), ("command", "\\"), ("word", ","), ("word", ";")}
)


def _stripped(tokens: list[Token]) -> list[Token]:
    while tokens and tokens[0][0] == "space":
        tokens = tokens[1:]
    while tokens and tokens[-1][0] == "space":
        tokens = tokens[:-1]
    return tokens


def _read_list(tokens: list[Token], sign: int) -> Any:
    parts = [part for part in map(_stripped, _split(tokens, _COMMAS).parts) if part]
    if not parts:
        raise UnreadableError("empty")
    items = [_read_relation(part, sign) for part in parts]
    return items[0] if len(items) == 1 else Collection("list", tuple(items))


def _read_relation(tokens: list[Token], sign: int) -> Any:
    signs = frozenset((kind, text) for text in _RELATIONS for kind in ("symbol", "command"))
    groups = _split(tokens, signs)
    sides = tuple(_read_element(_stripped(part), sign, name=n == 0) for n, part in enumerate(groups.parts))
    if len(sides) == 1:
        return sides[0]
    relations = tuple(_RELATIONS[text] for text in groups.separators)
    if relations == ("in",):
        return sides[1]
    if set(relations) == {"="}:
        return _chain(sides)
    return _inequality(sides, relations)


def _chain(sides: tuple[Any, ...]) -> Any:
    """Returns an equation; of a calculation such as ``2·3 − 1 = 5``, the result.

    Raises:
        UnreadableError: The calculation is false.
    """
    constants = [side for side in sides if _is_constant(side)]
    if any(not same_scalars(side, constants[-1]) for side in constants[:-1]):
        raise UnreadableError("a false equation")
    if len(constants) == len(sides):
        return sides[-1]
    if len(sides) == 2 and _is_constant(sides[0]) and getattr(getattr(sides[1], "value", None), "is_Symbol", False):
        return Relation((sides[1], sides[0]), ("=",))
    return Relation((sides[0], sides[-1]), ("=",))


def _is_constant(value: Any) -> bool:
    return isinstance(value, Scalar) and bool(getattr(value.value, "is_number", False))


def _inequality(sides: tuple[Any, ...], signs: tuple[str, ...]) -> Any:
    """Returns the set of solutions if one letter stands between numbers, else the relation."""
    import sympy

    values: list[Any] = [side.value if isinstance(side, Scalar) else None for side in sides]
    if None in values:
        raise UnreadableError("a relation of collections")
    letters = set().union(*(value.free_symbols for value in values))
    if len(letters) == 1 and all(value.is_number or value.is_Symbol for value in values):
        found = sympy.S.Reals
        for left, sign, right in zip(values, signs, values[1:], strict=False):
            found = found.intersect(_half_line(left, sign, right))
        return RealSet(found)
    if not letters:
        raise UnreadableError("a relation of numbers")
    return Relation(sides, signs)


def _half_line(left: Any, sign: str, right: Any) -> Any:
    import sympy

    if left.is_number:
        mirrored = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign)
        left, sign, right = right, mirrored, left
    if not (left.is_Symbol and right.is_extended_real):
        raise UnreadableError("a relation of numbers")
    if sign == "!=":
        return sympy.S.Reals - sympy.FiniteSet(right)
    if sign in ("<", "<="):
        return sympy.Interval(-sympy.oo, right, right_open=sign == "<")
    if sign in (">", ">="):
        return sympy.Interval(right, sympy.oo, left_open=sign == ">")
    return sympy.FiniteSet(right)


_SET_OPERATIONS = frozenset({("command", "cup"), ("command", "cap"), ("command", "setminus")})


def _read_element(tokens: list[Token], sign: int, name: bool = False) -> Any:
    groups = _split(tokens, _SET_OPERATIONS)
    if groups.separators:
        found = real_set(_read_element(_stripped(groups.parts[0]), sign))
        for operation, part in zip(groups.separators, groups.parts[1:], strict=True):
            other = real_set(_read_element(_stripped(part), sign))
            found = {"cup": found.union, "cap": found.intersect, "setminus": lambda x, s=found: s - x}[operation](other)
        return RealSet(found)
    if (collection := _bracketed(tokens, sign)) is not None:
        return collection
    return _read_scalar(tokens, sign)


def _bracketed(tokens: list[Token], sign: int) -> Collection | None:
    """Returns the tuple, interval or set whose brackets enclose all tokens."""
    if len(tokens) < 2:
        return None
    (first_kind, first), (_, last) = tokens[0], tokens[-1]
    left = "set" if (first_kind, first) == ("command", "{") else {"langle": "("}.get(first, first)
    right = {"rangle": ")"}.get(last, last)
    if left == "set":
        if tokens[-1] != ("command", "}"):
            return None
        inner = _split(tokens[1:-1], _COMMAS).parts
        return Collection("set", tuple(_read_relation(_stripped(part), sign) for part in inner))
    if (first_kind, first, last) == ("symbol", "[", "]") and len(_split(tokens[1:-1], _COMMAS).parts) == 1:
        raise UnreadableError("one value in square brackets")
    if left not in ("(", "[") or right not in (")", "]"):
        return None
    parts = _split(tokens[1:-1], _COMMAS - {("word", "and"), ("word", "or")}).parts
    depth = 0
    for kind, text in tokens[1:-1]:
        depth += (kind != "word" and text in ("(", "[", "langle")) - (text in (")", "]", "rangle"))
        if depth < 0:
            return None
    if len(parts) == 1:
        if left + right == "()" and any(kind == "symbol" and text in "([" for kind, text in parts[0][:1]):
            return _bracketed(_stripped(parts[0]), sign)
        return None
    return Collection(left + right, tuple(_read_element(_stripped(part), sign) for part in parts))


def _read_scalar(tokens: list[Token], sign: int) -> Scalar | RealSet:
    import sympy

    unit: Unit | None = None
    if tokens[:1] == [("command", "$")]:
        tokens, unit = tokens[1:], read_unit([("word", "dollar")])
    if tokens[:1] == [("symbol", "-")] and tokens[1:2] == [("command", "$")]:
        tokens, unit = [tokens[0], *tokens[2:]], read_unit([("word", "dollar")])
    if tokens and all(kind in ("word", "space") for kind, _ in tokens):
        if {text.lower() for kind, text in tokens if kind == "word"} in (
            {"all", "real", "numbers"},
            {"real", "numbers"},
        ):
            return RealSet(sympy.S.Reals)
        words = "_".join(text.lower() for kind, text in tokens if kind == "word")
        return Scalar(sympy.Symbol("text " + words))
    value, rest = Parser(tokens, sign).prefix()
    if value == sympy.Symbol("mathbb R") and not rest:
        return RealSet(sympy.S.Reals)
    while rest and rest[0] in MULTIPLIERS:
        value, rest = value * MULTIPLIERS[rest[0]], rest[1:]
    degree, percent = sympy.Symbol("°"), sympy.Symbol("%")
    has_percent = percent in value.free_symbols
    if degree in value.free_symbols:
        value, rest = value.subs(degree, 1), [("word", "degree"), *rest]
    value = value.subs(percent, 1)
    if rest and rest[0] == ("word", "percent"):
        has_percent, rest = True, rest[1:]
    if rest:
        if unit is not None and read_unit(rest) != unit:
            raise UnreadableError("two units")
        unit = read_unit(rest)
    return Scalar(value, unit, has_percent)


def real_set(value: Any) -> Any:
    """Returns the set of real numbers that a value means.

    Raises:
        UnreadableError: It means none.
    """
    import sympy

    if isinstance(value, RealSet):
        return value.value
    if isinstance(value, Collection) and all(isinstance(item, RealSet) for item in value.items):
        return sympy.Union(*(item.value for item in value.items))
    if isinstance(value, Collection):
        scalars = [item.value for item in value.items if isinstance(item, Scalar)]
        if len(scalars) == len(value.items) and all(scalar.is_extended_real for scalar in scalars):
            if value.kind == "set":
                return sympy.FiniteSet(*scalars)
            if len(scalars) == 2 and value.kind != "list":
                left, right = (bracket in "()" for bracket in value.kind)
                return sympy.Interval(*scalars, left_open=left, right_open=right)
    raise UnreadableError("not a set of real numbers")


def same_scalars(a: Scalar, b: Scalar) -> bool:
    """Returns whether two quantities are equal after conversion. 50 % equals both 50 and 0.5."""
    factor: Any = 1
    if a.unit is not None and b.unit is not None:
        if a.unit.dimension != b.unit.dimension:
            return False
        factor = a.unit.factor / b.unit.factor
    first, second = a.value * factor if factor != 1 else a.value, b.value
    if a.percent != b.percent:
        percentage, plain = (first, second) if a.percent else (second, first)
        return same_value(percentage, plain) or same_value(percentage / 100, plain)
    return same_value(first, second)
