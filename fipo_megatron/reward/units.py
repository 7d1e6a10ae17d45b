"""Units behind a number, and their conversion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fipo_megatron.reward.latex_tokens import Token, UnreadableError

MULTIPLIERS = {
    ("word", name): value
    for name, value in (
        ("dozen", 12), ("hundred", 100), ("thousand", 1000), ("million", 10**6), ("billion", 10**9),
        ("trillion", 10**12),
    )
}  # fmt: skip
"""Words that multiply the number before them."""

_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "m meter metre": "1",
        "km kilometer kilometre": "1000", "in inch inche": "127/5000", "ft foot feet": "381/1250",
        "yd yard": "1143/1250",
        "mi mile": "201168/125",
    },
    "mass": {"mg milligram": "1/1000000", "g gram": "1/1000", "kg kilogram": "1", "lb pound": "45359237/100000000"},
    "time": {
        "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
    },
    "money": {"cent ¢": "1/100", "dollar usd $": "1"},
    "volume": {"ml millilitre milliliter": "1/1000", "l litre liter": "1"},
    "angle": {"degree deg": "1"},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, names in _TABLE.items()
    for key, factor in names.items()
    for name in key.split()
}
_MAX_WORDS = 4
_LETTERS = frozenset("mgshlLNSEWJVAKCF")
_OTHER_WORDS = (
    "or and if else not about approximately roughly remainder something more less than at least most plus "
    "minus mod otherwise maybe perhaps nearly almost over under half when unless either neither nor but "
    "except percent k to from through between true false none yes no never times divided by sometimes "
    "squared cubed factorial choose root tenth hundredth thousandth millionth third halve quarter fourth "
    "fifth sixth below above zero negative is are was be cannot can impossible wrong incorrect isnt mistake "
    "dozen hundred thousand million billion then"
)
_NOT_UNITS = frozenset(_OTHER_WORDS.split())


@dataclass(frozen=True)
class Unit:
    """A unit.

    Attributes:
        dimension: Names of the base units with their powers; equal for units that can be converted.
        factor: Size in base units.
    """

    dimension: tuple[tuple[str, int], ...]
    factor: Any


def read_unit(tokens: Sequence[Token]) -> Unit:
    """Returns the unit that tokens such as ``cm``, ``m/s``, ``square units`` or ``mod 7`` mean.

    Raises:
        UnreadableError: The tokens are not a unit.
    """
    import sympy

    tokens = [token for token in tokens if token[0] != "space"]
    if sum(kind == "word" for kind, _ in tokens) > _MAX_WORDS:
        raise UnreadableError("a sentence, not a unit")
    if (modulus := _modulus(tokens)) is not None:
        return Unit(((f"mod {modulus}", 1),), 1)
    powers: dict[str, int] = {}
    factor = Fraction(1)
    sign, power, position = 1, 1, 0
    while position < len(tokens):
        kind, text = tokens[position]
        position += 1
        if text == "/" or text == "per":
            sign = -1
            continue
        if text in ("square", "cubic", "sq", "cu"):
            power = 3 if text in ("cubic", "cu") else 2
            continue
        if text in ("{", "}", ".", "cdot"):
            continue
        name = _name(kind, text)
        exponent, position = _exponent(tokens, position)
        exponent *= sign * power
        dimension, size = _UNITS.get(name, (name, Fraction(1)))
        powers[dimension] = powers.get(dimension, 0) + exponent
        factor *= size**exponent
        power = 1
    dimensions = tuple(sorted((name, count) for name, count in powers.items() if count and name != "unit"))
    return Unit(dimensions, sympy.Rational(factor.numerator, factor.denominator))


def _name(kind: str, text: str) -> str:
    if kind not in ("word", "letter") or not re.fullmatch(r"[A-Za-z.'$¢]+", text):
        raise UnreadableError(f"{text} is no unit")
    if len(text) == 1:
        if text not in _LETTERS and text not in "$¢":
            raise UnreadableError(f"{text} is no unit")
        return "l" if text == "L" else text
    name = text.lower().rstrip(".").replace(".", "")
    name = name if name in _UNITS or name.endswith("ss") else name.removesuffix("s")
    if name in _NOT_UNITS or text.lower() in _NOT_UNITS:
        raise UnreadableError(f"{text} is no unit")
    return name


def _exponent(tokens: Sequence[Token], position: int) -> tuple[int, int]:
    rest = [text for _, text in tokens[position : position + 4]]
    for length, pattern in ((4, ["^", "{", None, "}"]), (2, ["^", None])):
        found = rest[:length]
        if len(found) == length and all(p is None or p == text for p, text in zip(pattern, found, strict=True)):
            number = found[pattern.index(None)]
            if number.isdigit() and len(number) == 1:
                return int(number), position + length
    return 1, position


def _modulus(tokens: Sequence[Token]) -> str | None:
    """Returns the modulus of ``mod 7``, ``(mod 7)`` or a LaTeX form of it."""
    texts = [text for _, text in tokens if text not in ("(", ")", "{", "}")]
    return texts[1] if len(texts) == 2 and texts[0] in ("mod", "pmod") else None
