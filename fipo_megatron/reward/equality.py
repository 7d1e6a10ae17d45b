"""Equality of expressions by value."""

from __future__ import annotations

import random
from typing import Any

_DIGITS = 60
_SAMPLES = 6


def same_value(a: Any, b: Any) -> bool:
    """Returns whether two expressions are equal.

    Rational numbers are compared exactly, other numbers to about 45 digits, and expressions with letters at points that
    are drawn with a fixed seed.
    """
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
