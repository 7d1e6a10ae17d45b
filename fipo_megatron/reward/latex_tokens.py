"""Tokens of answers in LaTeX or plain text, and a reader of them."""

from __future__ import annotations

import re


class UnreadableError(ValueError):
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
    re.DOTALL | re.ASCII,
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
_FONT = re.compile(
    r"\\(?:mathbf|boldsymbol|mathit|mathsf|mathcal|bm|pmb|mathnormal|boxed|fbox|underline)(?=\s*\{)|"
    r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|rm|it)(?![A-Za-z])"
)
_POWER = re.compile(r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])")
_THIN_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\,|\\!|\u202f|\{,\}|\\ |,\\!)\d{3})+(?!\d)", re.ASCII)
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
FUNCTIONS = [
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "ln",
    "log",
    "exp",
    "lg",
    "max",
    "min",
    "gcd",
    "lcm",
    "det",
    "arg",
]
_NAMES = {"pi": "pi", "infinity": "infty", "inf": "infty", "sqrt": "sqrt", "infty": "infty"}
GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "varepsilon",
    "zeta",
    "eta",
    "theta",
    "vartheta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "varphi",
    "chi",
    "psi",
    "omega",
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Phi",
    "Psi",
    "Omega",
    "ell",
    "ldots",
]
SHORT_WORDS = frozenset(
    [
        "cm",
        "all",
        "km",
        "kg",
        "mm",
        "ft",
        "in",
        "lb",
        "oz",
        "ml",
        "mL",
        "hr",
        "min",
        "sec",
        "am",
        "pm",
        "or",
        "if",
        "and",
        "not",
        "mod",
        "men",
        "way",
        "day",
        "mph",
        "kmh",
        "deg",
        "units",
    ]
)


def simplify_notation(text: str) -> str:
    """Removes commands that only change the appearance, and writes symbols as LaTeX."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = "".join(_SYMBOLS.get(character, character) for character in text)
    text = _REPEATING.sub(_repeating, text)
    text = _THIN_GROUPS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text)
    text = text.replace("\u202f", " ")
    text = re.sub(r"\\\$|(?<!\\)\$", lambda match: r"\$" if len(match[0]) == 2 else " ", text)
    text = _IGNORED.sub(" ", text.replace(r"\!", ""))
    text = _POWER.sub("^", _FONT.sub("", text))
    return text.strip()


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    below = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + repeated) - int((whole + fixed) or 0)
    return rf"\frac{{{above}}}{{{below}}}"


def tokenize(text: str) -> list[Token]:
    """Splits a text into tokens. Inside parentheses, commas always separate; elsewhere they may group thousands.

    Raises:
        UnreadableError: The text begins with a tilde, the sign for "about".
    """
    if text.lstrip().startswith("~"):
        raise UnreadableError("about")
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
    if piece in FUNCTIONS:
        tokens.append(("command", piece))
    elif piece in _NAMES:
        tokens.append(("command", _NAMES[piece]))
    elif len(piece) > 1 and piece.isupper():
        tokens.append(("letter", piece))
    elif len(piece) > 3 or piece in SHORT_WORDS:
        tokens.append(("word", piece))
    else:
        tokens.extend(("letter", letter) for letter in piece)


class TokenReader:
    """A position in a list of tokens. Spaces are passed over."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self._position = tokens, 0

    def peek(self, ahead: int = 0) -> Token:
        """Returns the next token, or one further ``ahead``; the kind is ``end`` after the last."""
        position = self._position
        while True:
            while position < len(self._tokens) and self._tokens[position][0] == "space":
                position += 1
            if position >= len(self._tokens):
                return "end", ""
            if not ahead:
                return self._tokens[position]
            ahead, position = ahead - 1, position + 1

    def next(self) -> Token:
        """Returns the next token and moves past it."""
        token = self.peek()
        while self._position < len(self._tokens) and self._tokens[self._position][0] == "space":
            self._position += 1
        self._position += 1
        return token

    def take(self, *texts: str) -> bool:
        """Moves past the next symbol or command if it is one of ``texts``; returns whether it is."""
        kind, text = self.peek()
        if kind in ("symbol", "command") and text in texts:
            self.next()
            return True
        return False

    def expect(self, text: str) -> None:
        """Moves past a symbol or command that must be next."""
        if not self.take(text):
            raise UnreadableError(f"expected {text}")

    def raw_argument(self) -> str:
        """Returns the text of a group in braces, or of the next token."""
        kind, text = self.next()
        if (kind, text) != ("symbol", "{"):
            return text
        depth, found = 1, ""
        while True:
            kind, text = self.next()
            if kind == "end":
                raise UnreadableError("an open brace")
            depth += (text == "{") - (text == "}")
            if not depth:
                return found
            found += text
