"""Comparison of two answers by value."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from fipo_megatron.reward.answer_values import Collection, RealSet, Relation, Scalar, read, real_set, same_scalars
from fipo_megatron.reward.latex_tokens import simplify_notation

_EMPTY = re.compile(
    r"(?:there (?:is|are) )?(?:none|no (?:real |integer |positive |such )*(?:solutions?|roots?|values?)(?: exists?)?|"
    r"the empty set|empty set|empty|\\emptyset|\\varnothing|∅|\\\{\s*\\\}|\{\s*\})",
    re.IGNORECASE,
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{([^{}]*)\}")


def is_empty(text: str) -> bool:
    """Returns whether a text says that there is no solution."""
    return bool(_EMPTY.fullmatch(" ".join(_WORDS.sub(r" \1 ", text).split()).strip(" $.")))


def equal(given: str, expected: str) -> bool:
    """Returns whether two texts are the same answer.

    Raises:
        UnreadableError: A text is not an expression as a whole.
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


def _same(a: Any, b: Any, top: bool = False) -> bool:
    """Returns whether two values are the same answer. ``top`` allows what holds for whole answers only."""
    if isinstance(a, Collection) and a.kind == "set" and len(a.items) == 1 and not isinstance(b, Collection | RealSet):
        a = a.items[0]
    if isinstance(b, Collection) and b.kind == "set" and len(b.items) == 1 and not isinstance(a, Collection | RealSet):
        b = b.items[0]
    if isinstance(a, RealSet) or isinstance(b, RealSet):
        return bool(real_set(_result(a)) == real_set(_result(b)))
    if isinstance(a, Collection) and isinstance(b, Collection):
        return _same_collections(a, b)
    if isinstance(a, Relation) or isinstance(b, Relation):
        return _same_relations(a, b, top)
    if isinstance(a, Scalar) and isinstance(b, Scalar):
        return same_scalars(a, b)
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
    """Returns whether the differences of both sides have a constant quotient, positive for an inequality."""
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
