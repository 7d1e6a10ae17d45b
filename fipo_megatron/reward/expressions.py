r"""A parser of LaTeX expressions that reads a text whole or refuses it.

math-verify drops what it does not know (``4343_6`` is read as 4343, ``5\text{ hours}`` as 5) and then finds different
answers equal. Here each token must have a meaning, and numbers are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MAX_BITS = 100_000
"""Size of the largest power that is multiplied out."""
MAX_TERMS = 1000
"""Terms of the longest sum and factor of the largest factorial."""


class Unreadable(ValueError):
    """A text that is not an expression as a whole."""


Token = tuple[str, str]
"""Kind and text: ``number``, ``letter``, ``word`` (text), ``command``, ``unit`` (thin space) or ``symbol``."""

_SCAN = re.compile(
    r"(?P<space>\s+|\\[,;:!> ]|~|\\q?quad(?![a-z]))"
    r"|(?P<hex>0x[0-9A-Fa-f]+)"
    r"|(?P<based>[0-9A-Z]{1,40}_(?:\{\s*\d{1,2}\s*\}|\d{1,2}(?!\d)))"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<text>\\(?:text|textbf|textit|textrm|mathrm|mbox|operatorname|textnormal|texttt)\*?\s*\{(?P<inside>[^{}]*)\})"
    r"|(?P<command>\\(?:[A-Za-z]+|[^A-Za-z]))"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<symbol>.)",
    re.DOTALL,
)
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "le": "leq", "ge": "geq", "leqslant": "leq", "geqslant": "geq",
    "ne": "neq", "varnothing": "emptyset", "lbrace": "{", "rbrace": "}", "lvert": "vert", "rvert": "vert",
    "mid": "mid", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "lbrack": "[", "rbrack": "]",
    "dbinom": "binom", "tbinom": "binom", "lt": "<", "gt": ">", "ast": "times", "degree": "circ", "bmod": "mod",
    "smallsetminus": "setminus", "land": "wedge", "infinity": "infty", "colon": "symbol:",
}  # fmt: skip
_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ",
    "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ",
    "°": r"^\circ ", "º": r"^\circ ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "…": r"\ldots ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∠": r"\angle ", "’": "'", "√": r"\sqrt ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_IGNORED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|angle|measuredangle|triangle|mathstrut|"
    r"scriptstyle)(?![A-Za-z])\.?"
)
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|mathit|mathsf|mathcal|bm|pmb|mathnormal|boxed|fbox)\s*\{([^{}]*)\}")
_THIN_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\,|\\!|\u202f|\{,\}|\\ |,\\!)\d{3})+(?!\d)")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp lg max min gcd lcm det arg"
).split()
_NAMES = {"pi": "pi", "infinity": "infty", "inf": "infty", "sqrt": "sqrt", "infty": "infty"}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell ldots"
).split()
SHORT_WORDS = frozenset(
    "cm km kg mm ft in lb oz ml mL hr min sec am pm or if and not mod men way day mph kmh deg units".split()
)


def simplify_notation(text: str) -> str:
    """Removes commands that only change the appearance, and writes symbols as LaTeX."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = "".join(_SYMBOLS.get(character, character) for character in text)
    text = _REPEATING.sub(_repeating, text)
    text = _THIN_GROUPS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text)
    text = re.sub(r"\\\$|(?<!\\)\$", lambda match: r"\$" if len(match[0]) == 2 else " ", text)
    text = _IGNORED.sub(" ", text.replace(r"\!", ""))
    for _ in range(3):
        text = _FONT.sub(r"{\1}", text)
    return text.strip()


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    below = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + repeated) - int((whole + fixed) or 0)
    return rf"\frac{{{above}}}{{{below}}}"


def tokenize(text: str) -> list[Token]:
    """Splits a text into tokens. Inside parentheses, commas always separate; elsewhere they may group thousands.

    Raises:
        Unreadable: The text begins with a tilde, the sign for "about".
    """
    if text.lstrip().startswith("~"):
        raise Unreadable("about")
    tokens: list[Token] = []
    position, depth = 0, 0
    while position < len(text):
        match = _SCAN.match(text, position)
        assert match is not None
        kind, piece = match.lastgroup or "", match[0]
        if kind == "inside":
            kind = "text"
        if kind == "based" and not re.search(r"\d.*_|[A-Z]{2,}_\{?\s*(1[1-9]|2\d|3[0-6])", piece):
            match = re.compile(r"[A-Z]+").match(text, position) or match
            kind, piece = "letters", match[0]
        if kind == "grouped" and depth:
            match = re.compile(r"\d+").match(text, position) or match
            kind, piece = "number", match[0]
        position += len(piece)
        depth += (piece in ("(", r"\langle")) - (piece in (")", r"\rangle"))
        _append(tokens, kind, piece, match)
    return tokens


def _append(tokens: list[Token], kind: str, piece: str, match: re.Match[str]) -> None:
    if kind == "space":
        if tokens and tokens[-1][0] != "space":
            tokens.append(("space", " "))
    elif kind == "grouped":
        tokens.append(("number", piece.replace(",", "")))
    elif kind == "text":
        content = match["inside"].strip(" ~")
        name = content if len(content) == 1 and content.isalpha() else ""
        spaced = match["inside"] != content or bool(tokens and tokens[-1][0] == "space")
        if name in ("i", "e") or (name and not spaced and not (tokens and tokens[-1][0] == "number")):
            tokens.append(("letter", name))
        else:
            for word in re.findall(r"\d+(?:\.\d+)?|[A-Za-z'$][A-Za-z.'$]*|[^\sA-Za-z~]", content):
                tokens.append(("number" if word[0].isdigit() else "word", word))
    elif kind == "command":
        name = piece[1:]
        name = _COMMANDS.get(name, name)
        tokens.append(("command", name))
    elif kind == "letters":
        _append_letters(tokens, piece)
    else:
        tokens.append((kind, piece))


def _append_letters(tokens: list[Token], piece: str) -> None:
    if piece in _FUNCTIONS:
        tokens.append(("command", piece))
    elif piece in _NAMES:
        tokens.append(("command", _NAMES[piece]))
    elif len(piece) > 1 and piece.isupper():
        tokens.append(("letter", piece))
    elif len(piece) > 3 or piece in SHORT_WORDS:
        tokens.append(("word", piece))
    else:
        tokens.extend(("letter", letter) for letter in piece)


class Parser:
    """A recursive-descent parser of one expression; the result is a SymPy expression.

    Args:
        tokens: Tokens of :func:`tokenize`.
        sign: 1 to read ``±`` as plus, −1 to read it as minus.
    """

    def __init__(self, tokens: list[Token], sign: int = 1) -> None:
        import sympy

        self._sympy: Any = sympy
        self._tokens, self._position, self._sign = tokens, 0, sign
        self._depth = 0

    def whole(self) -> Any:
        """Returns the expression of all tokens.

        Raises:
            Unreadable: A token has no meaning at its place.
        """
        value = self._sum()
        if self._peek() != ("end", ""):
            raise Unreadable(f"{self._peek()[1]} at token {self._position}")
        return value

    def prefix(self) -> tuple[Any, list[Token]]:
        """Returns the expression at the start and the tokens that follow it."""
        value = self._sum()
        return value, [token for token in self._tokens[self._position :] if token[0] != "space"]

    def _peek(self, ahead: int = 0) -> Token:
        position = self._position
        while True:
            while position < len(self._tokens) and self._tokens[position][0] == "space":
                position += 1
            if position >= len(self._tokens):
                return "end", ""
            if not ahead:
                return self._tokens[position]
            ahead, position = ahead - 1, position + 1

    def _next(self) -> Token:
        token = self._peek()
        while self._position < len(self._tokens) and self._tokens[self._position][0] == "space":
            self._position += 1
        self._position += 1
        return token

    def _take(self, *texts: str) -> bool:
        kind, text = self._peek()
        if kind in ("symbol", "command") and text in texts:
            self._next()
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"expected {text}")

    def _sum(self) -> Any:
        self._depth += 1
        if self._depth > 40:
            raise Unreadable("too deep")
        value = self._signed()
        while True:
            if self._take("+"):
                value = value + self._term()
            elif self._take("-"):
                value = value - self._term()
            elif self._take("pm"):
                value = value + self._sign * self._term()
            elif self._take("mp"):
                value = value - self._sign * self._term()
            else:
                self._depth -= 1
                return value

    def _signed(self) -> Any:
        if self._take("+"):
            return self._signed()
        if self._take("-"):
            return -self._signed()
        if self._take("pm"):
            return self._sign * self._signed()
        if self._take("mp"):
            return -self._sign * self._signed()
        return self._term()

    def _term(self) -> Any:
        value, number = self._factor()
        while True:
            if self._take("times", "cdot", "*"):
                other = -self._power() if self._take("-") else self._power()
                value, number = value * other, False
            elif self._take("/", "div"):
                divisor, _ = self._factor() if not self._take("-") else (-self._power(), False)
                value, number = self._divide(value, divisor), False
            elif self._starts_factor():
                if number and self._peek()[0] == "number":
                    raise Unreadable("two numbers side by side")
                factor, number = self._factor()
                value = value * factor
            else:
                return value

    def _starts_factor(self) -> bool:
        kind, text = self._peek()
        if kind in ("number", "letter", "based", "hex"):
            return True
        if kind == "symbol":
            return text in "({"
        return kind == "command" and (text in _FUNCTIONS or text in _GREEK or text in _ATOMS)

    def _factor(self) -> tuple[Any, bool]:
        """Returns a factor, and whether it is a numeral. An integer before a proper fraction is a mixed number."""
        kind, text = self._peek()
        if kind != "number":
            return self._power(), False
        start = self._position
        if text.isdigit():
            self._next()
            fraction = self._proper_fraction()
            if fraction is not None:
                return self._sympy.Integer(text) + fraction, True
            self._position = start
        value = self._power()
        return value, True

    def _proper_fraction(self) -> Any:
        r"""Returns the fraction of ``1 1/2`` or ``1\frac{1}{2}`` after its integer, else None."""
        start = self._position
        a, b, c = self._peek(), self._peek(1), self._peek(2)
        if a[0] == "number" and b == ("symbol", "/") and c[0] == "number" and a[1].isdigit() and c[1].isdigit():
            if 0 < int(a[1]) < int(c[1]):
                self._position += 1
                for _ in range(3):
                    self._next()
                return self._sympy.Rational(int(a[1]), int(c[1]))
            raise Unreadable("a mixed number with an improper fraction")
        if a == ("command", "frac"):
            self._next()
            above, below = self._argument(), self._argument()
            if above.is_Integer and below.is_Integer and 0 < above < below and self._peek() != ("symbol", "^"):
                return above / below
            self._position = start
        return None

    def _divide(self, above: Any, below: Any) -> Any:
        if below.is_zero:
            raise Unreadable("division by zero")
        return above / below

    def _power(self) -> Any:
        value = self._postfix(self._atom())
        if self._take("^"):
            value = self._raised(value)
            value = self._postfix(value)
        return value

    def _raised(self, value: Any) -> Any:
        if self._take("circ"):
            return value * self._sympy.Symbol("°")
        if self._peek()[1] == "{" and self._peek(1) == ("command", "circ"):
            self._next(), self._next()
            self._expect("}")
            return value * self._sympy.Symbol("°")
        if self._peek() == ("symbol", "*") or self._peek()[0] == "end":
            raise Unreadable("no exponent")
        exponent = self._atom() if self._peek()[0] == "number" else self._argument()
        return self._pow(value, exponent)

    def _pow(self, base: Any, exponent: Any) -> Any:
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p).bit_length(), base.q.bit_length()) * abs(exponent)
            if bits > MAX_BITS:
                raise Unreadable("too large")
        if base.is_zero and (exponent.is_negative or not exponent.is_number):
            raise Unreadable("a power of zero")
        return base**exponent

    def _postfix(self, value: Any) -> Any:
        while True:
            if self._take("!"):
                if value.is_number and not (value.is_Integer and 0 <= value <= 5 * MAX_TERMS):
                    raise Unreadable("too large")
                value = self._sympy.factorial(value)
            elif self._take("%"):
                value = value * self._sympy.Symbol("%")
            else:
                return value

    def _argument(self) -> Any:
        """Returns a group in braces, or the next digit, letter or command."""
        if self._take("{"):
            value = self._sum()
            self._expect("}")
            return value
        kind, text = self._peek()
        if kind == "number" and len(text) > 1 and text.isdigit():
            while self._tokens[self._position][0] == "space":
                self._position += 1
            self._tokens = list(self._tokens)
            self._tokens[self._position] = ("number", text[1:])
            return self._sympy.Integer(text[0])
        if kind == "symbol" and text == "-":
            self._next()
            return -self._argument()
        return self._atom()

    def _atom(self) -> Any:
        kind, text = self._next()
        sympy = self._sympy
        if kind == "number":
            return _number(sympy, text)
        if kind == "hex":
            return sympy.Integer(int(text, 16))
        if kind == "based":
            return _based(sympy, text)
        if kind == "letter":
            return self._symbol(text)
        if kind == "symbol" and text in "({[":
            value = self._sum()
            self._expect({"(": ")", "{": "}", "[": "]"}[text])
            return value
        if kind == "symbol" and text == "|" or (kind, text) == ("command", "vert"):
            value = self._sum()
            if not self._take("|", "vert"):
                raise Unreadable("an open bar")
            return sympy.Abs(value)
        if kind == "command" and text in _FUNCTIONS:
            return self._function(text)
        if kind == "command" and text in _ATOMS:
            return _ATOMS[text](self)
        if kind == "command" and text in _GREEK:
            return self._symbol(text)
        raise Unreadable(f"{text or 'the end'} at token {self._position}")

    def _symbol(self, name: str) -> Any:
        subscript = ""
        if self._take("_"):
            subscript = "_" + self._raw_argument()
        while self._take("'"):
            subscript += "'"
        if not subscript and name in ("e", "i"):
            return self._sympy.E if name == "e" else self._sympy.I
        return self._sympy.Symbol(name + subscript)

    def _raw_argument(self) -> str:
        kind, text = self._next()
        if (kind, text) != ("symbol", "{"):
            return text
        depth, found = 1, ""
        while True:
            kind, text = self._next()
            if kind == "end":
                raise Unreadable("an open brace")
            depth += (text == "{") - (text == "}")
            if not depth:
                return found
            found += text

    def _function(self, name: str) -> Any:
        sympy = self._sympy
        base = power = None
        if name == "log" and self._take("_"):
            base = self._argument()
        if self._take("^"):
            power = self._argument()
        if name in ("max", "min", "gcd", "lcm"):
            values = self._values()
            function: Any = {"max": sympy.Max, "min": sympy.Min, "gcd": _gcd, "lcm": _lcm}[name]
            return function(*values)
        argument = self._function_argument().subs(sympy.Symbol("°"), sympy.pi / 180)
        if power == -1:
            name, power = "arc" + name, None
        function = {
            "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log,
            "lg": lambda x: sympy.log(x, 10),
        }.get(name) or getattr(sympy, name)  # fmt: skip
        value = self._divide(sympy.log(argument), sympy.log(base)) if base is not None else function(argument)
        return value if power is None else value**power

    def _function_argument(self) -> Any:
        if self._peek() in (("symbol", "("), ("symbol", "{")):
            return self._power()
        value = self._signed_power()
        while self._starts_factor() and self._peek()[1] not in _FUNCTIONS and self._peek() != ("symbol", "("):
            value = value * self._power()
        return value

    def _signed_power(self) -> Any:
        return -self._power() if self._take("-") else self._power()

    def _values(self) -> list[Any]:
        self._expect("(")
        values = [self._sum()]
        while self._take(","):
            values.append(self._sum())
        self._expect(")")
        return values

    def fraction(self) -> Any:
        above, below = self._argument(), self._argument()
        return self._divide(above, below)

    def root(self) -> Any:
        degree = self._sympy.Integer(2)
        if self._take("["):
            degree = self._sum()
            self._expect("]")
        return self._argument() ** self._divide(self._sympy.Integer(1), degree)

    def binomial(self) -> Any:
        above, below = self._argument(), self._argument()
        if above.is_number and below.is_number and max(abs(above), abs(below)) > 5 * MAX_TERMS:
            raise Unreadable("too large")
        return self._sympy.binomial(above, below)

    def rounded(self, function: str, right: str) -> Any:
        value = self._sum()
        self._expect(right)
        return getattr(self._sympy, function)(value)

    def summed(self, kind: str) -> Any:
        self._expect("_")
        self._expect("{")
        index = self._sympy.Symbol(self._next()[1])
        self._expect("=")
        first = self._sum()
        self._expect("}")
        self._expect("^")
        last = self._argument()
        term = self._term().subs(self._sympy.I, index) if index.name == "i" else self._term()
        if first.is_Integer and last.is_Integer and last - first <= MAX_TERMS:
            values = [term.subs(index, n) for n in range(int(first), int(last) + 1)]
            return (self._sympy.Add if kind == "Sum" else self._sympy.Mul)(*values)
        return getattr(self._sympy, kind)(term, (index, first, last)).doit()

    def accented(self, name: str) -> Any:
        return self._sympy.Symbol(f"{name} {self._raw_argument()}")

    def matrix(self) -> Any:
        self._expect("{")
        name = ""
        while not self._take("}"):
            kind, text = self._next()
            if kind == "end":
                raise Unreadable("an open environment")
            name += text
        if name not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "smallmatrix"):
            raise Unreadable(f"environment {name}")
        rows: list[list[Any]] = [[]]
        while True:
            rows[-1].append(self._sum())
            if self._take("&"):
                continue
            if self._take("\\") and self._peek() != ("command", "end"):
                rows.append([])
                continue
            self._expect("end")
            self._raw_argument()
            break
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different lengths")
        value = self._sympy.ImmutableMatrix(rows)
        return value.det() if name == "vmatrix" and value.is_square else value


_ATOMS: dict[str, Callable[[Parser], Any]] = {
    "frac": Parser.fraction,
    "sqrt": Parser.root,
    "binom": Parser.binomial,
    "lfloor": lambda parser: parser.rounded("floor", "rfloor"),
    "lceil": lambda parser: parser.rounded("ceiling", "rceil"),
    "sum": lambda parser: parser.summed("Sum"),
    "prod": lambda parser: parser.summed("Product"),
    "pi": lambda parser: parser._sympy.pi,
    "infty": lambda parser: parser._sympy.oo,
    "begin": Parser.matrix,
    "imath": lambda parser: parser._sympy.I,
} | {
    name: lambda parser, name=name: parser.accented(name)  # type: ignore[misc]  # the default binds the name
    for name in ("vec", "overrightarrow", "overline", "bar", "hat", "widehat", "tilde", "mathbb", "overleftrightarrow")
}


def _number(sympy: Any, text: str) -> Any:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 1000:
        raise Unreadable("too large")
    return sympy.Rational(mantissa.rstrip(".") or "0") * sympy.Integer(10) ** int(exponent or 0)


def _based(sympy: Any, text: str) -> Any:
    """Returns the value of a numeral with its base, such as ``1010_2``."""
    digits, _, base = text.partition("_")
    try:
        return sympy.Integer(int(digits, int(base.strip("{} "))))
    except ValueError:
        raise Unreadable(f"{text} is no numeral") from None


def _gcd(*values: Any) -> Any:
    import sympy

    return sympy.gcd_list(values)


def _lcm(*values: Any) -> Any:
    import sympy

    return sympy.lcm_list(values)
