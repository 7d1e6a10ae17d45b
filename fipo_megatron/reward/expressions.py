r"""A parser of LaTeX expressions that reads a text whole or refuses it.

math-verify drops what it does not know (``4343_6`` is read as 4343, ``5\text{ hours}`` as 5) and then finds different
answers equal. Here each token must have a meaning, and numbers are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fipo_megatron.reward.latex_tokens import FUNCTIONS, GREEK, Token, TokenReader, UnreadableError

MAX_BITS = 100_000
"""Size of the largest power that is multiplied out."""
MAX_TERMS = 1000
"""Terms of the longest sum; a fifth of the largest number whose factorial is computed."""


class Parser(TokenReader):
    """A recursive-descent parser of one expression; the result is a SymPy expression.

    Args:
        tokens: Tokens of :func:`tokenize`.
        sign: 1 to read ``±`` as plus, −1 to read it as minus.
    """

    def __init__(self, tokens: list[Token], sign: int = 1) -> None:
        import sympy

        self.sympy: Any = sympy
        """The module, which is imported when the first answer needs it."""
        super().__init__(tokens)
        self._sign = sign
        self._depth = 0

    def whole(self) -> Any:
        """Returns the expression of all tokens.

        Raises:
            UnreadableError: A token has no meaning at its place.
        """
        value = self.sum()
        if self.peek() != ("end", ""):
            raise UnreadableError(f"{self.peek()[1]} at token {self._position}")
        return value

    def prefix(self) -> tuple[Any, list[Token]]:
        """Returns the expression at the start and the tokens that follow it."""
        value = self.sum()
        return value, [token for token in self._tokens[self._position :] if token[0] != "space"]

    def sum(self) -> Any:
        """Returns the sum that begins here."""
        self._depth += 1
        if self._depth > 40:
            raise UnreadableError("too deep")
        value = self._signed()
        while True:
            if self.take("+"):
                value = value + self.term()
            elif self.take("-"):
                value = value - self.term()
            elif self.take("pm"):
                value = value + self._sign * self.term()
            elif self.take("mp"):
                value = value - self._sign * self.term()
            else:
                self._depth -= 1
                return value

    def _signed(self) -> Any:
        if self.take("+"):
            return self._signed()
        if self.take("-"):
            return -self._signed()
        if self.take("pm"):
            return self._sign * self._signed()
        if self.take("mp"):
            return -self._sign * self._signed()
        return self.term()

    def term(self) -> Any:
        """Returns the product that begins here, written with signs or side by side."""
        value, number = self._factor()
        while True:
            if self.take("times", "cdot", "*"):
                other = -self.power() if self.take("-") else self.power()
                value, number = value * other, False
            elif self.take("/", "div"):
                divisor, _ = self._factor() if not self.take("-") else (-self.power(), False)
                value, number = self.divide(value, divisor), False
            elif self._starts_factor():
                if number and self.peek()[0] == "number":
                    raise UnreadableError("two numbers side by side")
                factor, number = self._factor()
                value = value * factor
            else:
                return value

    def _starts_factor(self) -> bool:
        kind, text = self.peek()
        if kind in ("number", "letter", "based", "hex"):
            return True
        if kind == "symbol":
            return text in "({"
        return kind == "command" and (text in FUNCTIONS or text in GREEK or text in _ATOMS)

    def _factor(self) -> tuple[Any, bool]:
        """Returns a factor, and whether it is a numeral. An integer before a proper fraction is a mixed number."""
        kind, text = self.peek()
        if kind != "number":
            return self.power(), False
        start = self._position
        if text.isdigit():
            self.next()
            fraction = self._proper_fraction()
            if fraction is not None:
                return self._postfix(self.sympy.Integer(text) + fraction), True
            self._position = start
        value = self.power()
        return value, True

    def _proper_fraction(self) -> Any:
        r"""Returns the fraction of ``1 1/2`` or ``1\frac{1}{2}`` after its integer, else None."""
        start = self._position
        a, b, c = self.peek(), self.peek(1), self.peek(2)
        if a[0] == "number" and b == ("symbol", "/") and c[0] == "number" and a[1].isdigit() and c[1].isdigit():
            if 0 < int(a[1]) < int(c[1]):
                self._position += 1
                for _ in range(3):
                    self.next()
                return self.sympy.Rational(int(a[1]), int(c[1]))
            raise UnreadableError("a mixed number with an improper fraction")
        if a == ("command", "frac"):
            self.next()
            above, below = self.argument(), self.argument()
            if above.is_Integer and below.is_Integer and 0 < above < below and self.peek() != ("symbol", "^"):
                return above / below
            self._position = start
        return None

    def divide(self, above: Any, below: Any) -> Any:
        """Returns a quotient; division by zero is not readable."""
        if below.is_zero:
            raise UnreadableError("division by zero")
        return above / below

    def power(self) -> Any:
        """Returns an atom with its exponent, factorial or degree sign."""
        value = self._postfix(self._atom())
        if self.take("^"):
            value = self._raised(value)
            value = self._postfix(value)
        return value

    def _raised(self, value: Any) -> Any:
        if self.take("circ"):
            return value * self.sympy.Symbol("°")
        if self.peek()[1] == "{" and self.peek(1) == ("command", "circ"):
            self.next(), self.next()
            self.expect("}")
            return value * self.sympy.Symbol("°")
        if self.peek() == ("symbol", "*") or self.peek()[0] == "end":
            raise UnreadableError("no exponent")
        exponent = self._atom() if self.peek()[0] == "number" else self.argument()
        return self._pow(value, exponent)

    def _pow(self, base: Any, exponent: Any) -> Any:
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p).bit_length(), base.q.bit_length()) * abs(exponent)
            if bits > MAX_BITS:
                raise UnreadableError("too large")
        if base.is_zero and (exponent.is_negative or not exponent.is_number):
            raise UnreadableError("a power of zero")
        return base**exponent

    def _postfix(self, value: Any) -> Any:
        while True:
            if self.take("!"):
                if value.is_number and not (value.is_Integer and 0 <= value <= 5 * MAX_TERMS):
                    raise UnreadableError("too large")
                value = self.sympy.factorial(value)
            elif self.take("%"):
                value = value * self.sympy.Symbol("%")
            else:
                return value

    def argument(self) -> Any:
        """Returns a group in braces, or the next digit, letter or command."""
        if self.take("{"):
            value = self.sum()
            self.expect("}")
            return value
        kind, text = self.peek()
        if kind == "number" and len(text) > 1 and text.isdigit():
            while self._tokens[self._position][0] == "space":
                self._position += 1
            self._tokens = list(self._tokens)
            self._tokens[self._position] = ("number", text[1:])
            return self.sympy.Integer(text[0])
        if kind == "symbol" and text == "-":
            self.next()
            return -self.argument()
        return self._atom()

    def _atom(self) -> Any:
        kind, text = self.next()
        sympy = self.sympy
        if kind == "number":
            return _number(sympy, text)
        if kind == "hex":
            return sympy.Integer(int(text, 16))
        if kind == "based":
            return _based(sympy, text)
        if kind == "letter":
            return self._symbol(text)
        if kind == "symbol" and text in "({[":
            value = self.sum()
            self.expect({"(": ")", "{": "}", "[": "]"}[text])
            return value
        if (kind == "symbol" and text == "|") or (kind, text) == ("command", "vert"):
            value = self.sum()
            if not self.take("|", "vert"):
                raise UnreadableError("an open bar")
            return sympy.Abs(value)
        if kind == "command" and text in FUNCTIONS:
            return self._function(text)
        if kind == "command" and text in _ATOMS:
            return _ATOMS[text](self)
        if kind == "command" and text in GREEK:
            return self._symbol(text)
        raise UnreadableError(f"{text or 'the end'} at token {self._position}")

    def _symbol(self, name: str) -> Any:
        subscript = ""
        if self.take("_"):
            subscript = "_" + self.raw_argument()
        while self.take("'"):
            subscript += "'"
        if not subscript and name in ("e", "i"):
            return self.sympy.E if name == "e" else self.sympy.I
        return self.sympy.Symbol(name + subscript)

    def _function(self, name: str) -> Any:
        sympy = self.sympy
        base = power = None
        if name == "log" and self.take("_"):
            base = self.argument()
        if self.take("^"):
            power = self.argument()
        if name in ("max", "min", "gcd", "lcm"):
            values = _values(self)
            function: Any = {"max": sympy.Max, "min": sympy.Min, "gcd": _gcd, "lcm": _lcm}[name]
            return function(*values)
        argument = self._function_argument().subs(sympy.Symbol("°"), sympy.pi / 180)
        if power == -1:
            name, power = "arc" + name, None
        function = {
            "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log,
            "lg": lambda x: sympy.log(x, 10),
        }.get(name) or getattr(sympy, name)  # fmt: skip
        value = self.divide(sympy.log(argument), sympy.log(base)) if base is not None else function(argument)
        return value if power is None else value**power

    def _function_argument(self) -> Any:
        if self.peek() in (("symbol", "("), ("symbol", "{")):
            return self.power()
        value = self._signed_power()
        while self._starts_factor() and self.peek()[1] not in FUNCTIONS and self.peek() != ("symbol", "("):
            value = value * self.power()
        return value

    def _signed_power(self) -> Any:
        return -self.power() if self.take("-") else self.power()


def _fraction(parser: Parser) -> Any:
    above, below = parser.argument(), parser.argument()
    return parser.divide(above, below)


def _root(parser: Parser) -> Any:
    degree = parser.sympy.Integer(2)
    if parser.take("["):
        degree = parser.sum()
        parser.expect("]")
    return parser.argument() ** parser.divide(parser.sympy.Integer(1), degree)


def _binomial(parser: Parser) -> Any:
    above, below = parser.argument(), parser.argument()
    if above.is_number and below.is_number and max(abs(above), abs(below)) > 5 * MAX_TERMS:
        raise UnreadableError("too large")
    return parser.sympy.binomial(above, below)


def _rounded(parser: Parser, function: str, right: str) -> Any:
    value = parser.sum()
    parser.expect(right)
    return getattr(parser.sympy, function)(value)


def _summed(parser: Parser, kind: str) -> Any:
    parser.expect("_")
    parser.expect("{")
    index = parser.sympy.Symbol(parser.next()[1])
    parser.expect("=")
    first = parser.sum()
    parser.expect("}")
    parser.expect("^")
    last = parser.argument()
    term = parser.term().subs(parser.sympy.I, index) if index.name == "i" else parser.term()
    if first.is_Integer and last.is_Integer and last - first <= MAX_TERMS:
        values = [term.subs(index, n) for n in range(int(first), int(last) + 1)]
        return (parser.sympy.Add if kind == "Sum" else parser.sympy.Mul)(*values)
    return getattr(parser.sympy, kind)(term, (index, first, last)).doit()


def _accented(parser: Parser, name: str) -> Any:
    return parser.sympy.Symbol(f"{name} {parser.raw_argument()}")


def _matrix(parser: Parser) -> Any:
    parser.expect("{")
    name = ""
    while not parser.take("}"):
        kind, text = parser.next()
        if kind == "end":
            raise UnreadableError("an open environment")
        name += text
    if name not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "smallmatrix"):
        raise UnreadableError(f"environment {name}")
    rows: list[list[Any]] = [[]]
    while True:
        rows[-1].append(parser.sum())
        if parser.take("&"):
            continue
        if parser.take("\\") and parser.peek() != ("command", "end"):
            rows.append([])
            continue
        parser.expect("end")
        parser.raw_argument()
        break
    if len({len(row) for row in rows}) != 1:
        raise UnreadableError("rows of different lengths")
    value = parser.sympy.ImmutableMatrix(rows)
    return value.det() if name == "vmatrix" and value.is_square else value


def _values(parser: Parser) -> list[Any]:
    parser.expect("(")
    values = [parser.sum()]
    while parser.take(","):
        values.append(parser.sum())
    parser.expect(")")
    return values


_ATOMS: dict[str, Callable[[Parser], Any]] = {
    "frac": _fraction,
    "sqrt": _root,
    "binom": _binomial,
    "lfloor": lambda parser: _rounded(parser, "floor", "rfloor"),
    "lceil": lambda parser: _rounded(parser, "ceiling", "rceil"),
    "sum": lambda parser: _summed(parser, "Sum"),
    "prod": lambda parser: _summed(parser, "Product"),
    "pi": lambda parser: parser.sympy.pi,
    "infty": lambda parser: parser.sympy.oo,
    "begin": _matrix,
    "imath": lambda parser: parser.sympy.I,
} | {
    name: lambda parser, name=name: _accented(parser, name)
    for name in ("vec", "overrightarrow", "overline", "bar", "hat", "widehat", "tilde", "mathbb", "overleftrightarrow")
}


def _number(sympy: Any, text: str) -> Any:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 1000:
        raise UnreadableError("too large")
    return sympy.Rational(mantissa.rstrip(".") or "0") * sympy.Integer(10) ** int(exponent or 0)


def _based(sympy: Any, text: str) -> Any:
    """Returns the value of a numeral with its base, such as ``1010_2``."""
    digits, _, base = text.partition("_")
    try:
        return sympy.Integer(int(digits, int(base.strip("{} "))))
    except ValueError:
        raise UnreadableError(f"{text} is no numeral") from None


def _gcd(*values: Any) -> Any:
    import sympy

    return sympy.gcd_list(values)


def _lcm(*values: Any) -> Any:
    import sympy

    return sympy.lcm_list(values)
