"""Comparison of two answers by value: numbers, quantities with units, lists, tuples, sets, intervals, equations."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from fipo_megatron.reward.expressions import Parser, Token, Unreadable, simplify_notation, tokenize
from fipo_megatron.reward.units import MULTIPLIERS, Unit, read_unit

_DIGITS = 60
_SAMPLES = 6
_RELATIONS = {"=": "=", "<": "<", ">": ">", "leq": "<=", "geq": ">=", "equiv": "=", "neq": "!=", "in": "in"}
_CONDITION = re.compile(
    r"[,;]?\s*(?:\\ \s*)?(?:\(\s*)?(?:\\text\s*\{\s*(?:where|for|with)?\s*\}|where|for|with)?\s*"
    r"(?<![A-Za-z\\])[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\\in\s*(?:\\mathbb\s*\{?\s*[ZNRQC]\s*\}?|\\?[ZNRQ])(?:\^?[+*]|_\{?\\?\w+\}?)?\s*\)?$"
)
_EMPTY = re.compile(
    r"(?:there (?:is|are) )?(?:none|no (?:real |integer |positive |such )*(?:solutions?|roots?|values?)(?: exists?)?|"
    r"the empty set|empty set|empty|\\emptyset|\\varnothing|∅|\\\{\s*\\\}|\{\s*\})",
    re.IGNORECASE,
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{([^{}]*)\}")
_PAIRS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


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


def is_empty(text: str) -> bool:
    """Whether a text says that there is no solution."""
    return bool(_EMPTY.fullmatch(" ".join(_WORDS.sub(r" \1 ", text).split()).strip(" $.")))


def equal(given: str, expected: str) -> bool:
    """Whether two texts are the same answer.

    Raises:
        Unreadable: A text is not an expression as a whole.
    """
    if is_empty(given) or is_empty(expected):
        return is_empty(given) and is_empty(expected)
    ratio = _ratio(given), _ratio(expected)
    if ratio[0] and ratio[1]:
        return ratio[0] == ratio[1]
    if ratio[0] or ratio[1]:
        plain, fraction = (expected, ratio[0]) if ratio[0] else (given, ratio[1])
        assert fraction is not None
        return len(fraction) == 2 and _same(read(plain), _quotient(fraction))
    return _same(read(given), read(expected), top=True)


def _quotient(ratio: tuple[Fraction, ...]) -> Scalar:
    import sympy

    return Scalar(sympy.Rational(ratio[0].numerator, ratio[0].denominator))


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """Returns the terms of ``3:4`` or ``1:2:3`` over the last term."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\s*(?::|\\colon)\s*\d{1,9})+)\s*", simplify_notation(text))
    if match is None:
        return None
    terms = [int(term) for term in re.split(r":|\\colon", match[1])]
    return tuple(Fraction(term, terms[-1]) for term in terms) if terms[-1] else None


def read(text: str) -> Any:
    """Parses an answer as a whole.

    Raises:
        Unreadable: The text, or a part of it, is not understood.
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
        raise Unreadable("empty")
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
        Unreadable: The calculation is false.
    """
    constants = [side for side in sides if _is_constant(side)]
    if any(not _same(side, constants[-1]) for side in constants[:-1]):
        raise Unreadable("a false equation")
    if len(constants) == len(sides):
        return sides[-1]
    return Relation((sides[0], sides[-1]), ("=",))


def _is_constant(value: Any) -> bool:
    return isinstance(value, Scalar) and bool(getattr(value.value, "is_number", False))


def _inequality(sides: tuple[Any, ...], signs: tuple[str, ...]) -> Any:
    """Returns the set of solutions if one letter stands between numbers, else the relation."""
    import sympy

    values = [side.value if isinstance(side, Scalar) else None for side in sides]
    if any(value is None for value in values):
        raise Unreadable("a relation of collections")
    letters = set().union(*(value.free_symbols for value in values))
    if len(letters) == 1 and all(value.is_number or value.is_Symbol for value in values):
        found = sympy.S.Reals
        for left, sign, right in zip(values, signs, values[1:], strict=False):
            found = found.intersect(_half_line(left, sign, right))
        return RealSet(found)
    if not letters:
        raise Unreadable("a relation of numbers")
    return Relation(sides, signs)


def _half_line(left: Any, sign: str, right: Any) -> Any:
    import sympy

    if left.is_number:
        mirrored = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign)
        left, sign, right = right, mirrored, left
    if not (left.is_Symbol and right.is_extended_real):
        raise Unreadable("a relation of numbers")
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
        found = _real_set(_read_element(_stripped(groups.parts[0]), sign))
        for operation, part in zip(groups.separators, groups.parts[1:], strict=True):
            other = _real_set(_read_element(_stripped(part), sign))
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
        raise Unreadable("one value in square brackets")
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
            raise Unreadable("two units")
        unit = read_unit(rest)
    return Scalar(value, unit, has_percent)


def _real_set(value: Any) -> Any:
    """Returns the set of real numbers that a value means.

    Raises:
        Unreadable: It means none.
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
    raise Unreadable("not a set of real numbers")


def _same(a: Any, b: Any, top: bool = False) -> bool:
    """Whether two values are the same answer. ``top`` allows what holds for whole answers only."""
    if isinstance(a, Collection) and a.kind == "set" and len(a.items) == 1 and not isinstance(b, Collection | RealSet):
        a = a.items[0]
    if isinstance(b, Collection) and b.kind == "set" and len(b.items) == 1 and not isinstance(a, Collection | RealSet):
        b = b.items[0]
    if isinstance(a, RealSet) or isinstance(b, RealSet):
        return bool(_real_set(_result(a)) == _real_set(_result(b)))
    if isinstance(a, Collection) and isinstance(b, Collection):
        return _same_collections(a, b)
    if isinstance(a, Relation) or isinstance(b, Relation):
        return _same_relations(a, b, top)
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        return _same_scalars(a, b)
    return False


def _result(value: Any) -> Any:
    return value.sides[-1] if isinstance(value, Relation) and value.signs == ("=",) else value


def _same_collections(a: Collection, b: Collection) -> bool:
    kinds = {a.kind, b.kind}
    named = _by_name(a), _by_name(b)
    if named[0] and named[1]:
        if named[0].keys() == named[1].keys():
            return all(_same(value, named[1][name]) for name, value in named[0].items())
        return False
    if (named[0] or named[1]) and kinds != {"list"} and "set" not in kinds:
        return len(a.items) == len(b.items) and all(
            _same(_result(x), _result(y)) for x, y in zip(a.items, b.items, strict=True)
        )
    items = [_result(item) for item in a.items], [_result(item) for item in b.items]
    if kinds <= {"list", "set"}:
        if "set" in kinds:
            return all(any(_same(x, y) for y in items[1]) for x in items[0]) and all(
                any(_same(x, y) for x in items[0]) for y in items[1]
            )
        if any(_has_dots(item) for item in items[0] + items[1]):
            return len(items[0]) == len(items[1]) and all(map(_same, *items))
        return _same_multisets(*items)
    return a.kind == b.kind and len(items[0]) == len(items[1]) and all(map(_same, *items))


def _has_dots(item: Any) -> bool:
    return isinstance(item, Scalar) and any(str(s) == "ldots" for s in getattr(item.value, "free_symbols", ()))


def _same_multisets(a: list[Any], b: list[Any]) -> bool:
    left = list(b)
    for item in a:
        match = next((n for n, other in enumerate(left) if _same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _by_name(collection: Collection) -> dict[str, Any]:
    """Returns the values of ``a = 1, b = 2`` by their names; empty unless all items have distinct names."""
    names: dict[str, Any] = {}
    for item in collection.items:
        if not isinstance(item, Relation) or item.signs != ("=",) or not isinstance(item.sides[0], Scalar):
            return {}
        names[str(item.sides[0].value)] = item.sides[1]
    return names if len(names) == len(collection.items) else {}


def _same_relations(a: Any, b: Any, top: bool) -> bool:
    if isinstance(a, Relation) and isinstance(b, Relation):
        if a.signs == b.signs and len(a.sides) == len(b.sides) and all(map(_same, a.sides, b.sides)):
            return True
        scalars = [side for side in (*a.sides, *b.sides) if isinstance(side, Scalar) and side.unit is None]
        if len(a.sides) == len(b.sides) == 2 and len(scalars) == 4 and _proportional(a, b):
            return True
        both = a.signs == b.signs == ("=",) and _is_name(a.sides[0]) and _is_name(b.sides[0])
        return top and both and a.sides[0] != b.sides[0] and _same(a.sides[1], b.sides[1])
    relation, other = (a, b) if isinstance(a, Relation) else (b, a)
    if relation.signs != ("=",):
        return False
    if isinstance(other, Collection) and other.kind == "list":
        return False
    return _same(relation.sides[1], other)


def _is_name(side: Any) -> bool:
    return isinstance(side, Scalar) and bool(getattr(side.value, "is_Symbol", False))


def _proportional(a: Relation, b: Relation) -> bool:
    """Whether the differences of both sides have a constant quotient, positive for an inequality."""
    import sympy

    first, second = (relation.sides[0].value - relation.sides[1].value for relation in (a, b))
    mirrored = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    if first == 0 or second == 0:
        return False
    quotient = sympy.cancel(first / second)
    if not quotient.is_number or quotient.is_zero or not quotient.is_finite:
        return False
    if a.signs == b.signs:
        return a.signs in (("=",), ("!=",)) or bool(quotient.is_positive)
    return mirrored.get(a.signs[0]) == b.signs[0] and bool(quotient.is_negative)


def _same_scalars(a: Scalar, b: Scalar) -> bool:
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


def same_value(a: Any, b: Any) -> bool:
    """Whether two expressions are equal: rational numbers exactly, others to 60 digits at points drawn with a seed."""
    import sympy

    if a == b:
        return True
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        shapes = getattr(a, "shape", None) == getattr(b, "shape", 0)
        return shapes and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if a.is_Rational and b.is_Rational:
        return False
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    if not letters:
        return _same_constants(a, b)
    if a.free_symbols != b.free_symbols and (a.is_Symbol or b.is_Symbol) and len(letters) > 1:
        return False
    draw, agreed = random.Random(0), 0
    for _ in range(3 * _SAMPLES):
        point = {letter: _sample(str(letter), draw) for letter in letters}
        values = [_evaluate(expression.subs(point)) for expression in (a, b)]
        if None in values:
            continue
        if not _close(*values):
            return False
        agreed += 1
        if agreed == _SAMPLES:
            return True
    return bool(sympy.simplify(a - b) == 0)


def _sample(name: str, draw: random.Random) -> Any:
    """Returns a value for a letter: a natural number for n, k and m, else any real number."""
    import sympy

    if name in ("n", "k", "m"):
        return sympy.Integer(draw.randint(1, 40))
    return sympy.Rational(draw.randint(-3000, 3000), 997)


def _evaluate(expression: Any) -> Any:
    """Returns a number of 60 digits; None where the expression has no finite value."""
    value = expression.evalf(_DIGITS, maxn=400)
    parts = value.as_real_imag()
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    return value


def _close(a: Any, b: Any) -> bool:
    import sympy

    scale = max(abs(sympy.N(a, 15)), abs(sympy.N(b, 15)))
    return bool(abs(sympy.N(a - b, 15)) <= scale * sympy.Float(10) ** (15 - _DIGITS))


def _same_constants(a: Any, b: Any) -> bool:
    import sympy

    if not (a.is_finite and b.is_finite):
        return bool(a == b)
    values = _evaluate(a), _evaluate(b)
    if None in values:
        return bool(sympy.simplify(a - b) == 0)
    return _close(*values)
