"""Hostile answers: fixed ones, then random ones, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

MARK = "/tmp/fipo_megatron_answer_was_executed"

FIXED = (
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(10!)!",
    "100000!",
    r"\binom{1000000}{500000}",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k}",
    r"\prod_{k=1}^{10000000} k",
    r"\int_0^1 \sin(\sin(\sin(\sin(x^{x^x})))) dx",
    r"\frac{" * 200 + "1" + "}{2}" * 200,
    r"\sqrt{" * 120 + "2" + "}" * 120,
    "{" * 5000,
    "}" * 5000,
    "(" * 280,
    r"\left(" * 60,
    "x" * 100_000,
    "1" * 100_000,
    "1," * 50_000,
    "\\" * 299,
    "\0" * 50,
    "3\x004",
    "٣٤",
    "³⁴",
    "３５",
    "𝟛𝟜",
    "\u202e43",
    "\ud800",
    "$(touch " + MARK + ")",
    "`touch " + MARK + "`",
    "; touch " + MARK + " #",
    "__import__('os').system('touch " + MARK + "')",
    "().__class__.__bases__[0].__subclasses__()",
    "exec(\"open('" + MARK + "','w')\")",
    r"\input{/etc/passwd}",
    r"\write18{touch " + MARK + "}",
    "lambda: (yield)",
    "x" + "^x" * 100,
    "+".join(f"x^{{{i}}}" for i in range(40)),
    "(" + "+".join("abcdefgh") + ")^{500}",
    r"\begin{pmatrix}" + "&".join("1" * 50) + r"\\" * 20 + r"\end{pmatrix}",
    "x=y=z=w=1=2=3",
    "1/0",
    r"\frac{0}{0}",
    "nan",
    "inf",
    "1e999999999",
    "0x" + "f" * 200,
)

_PIECES = (
    *(r"\frac{", r"\sqrt{", "}", "{", "(", ")", "^", "_", "+", "-", "*", "/", "!", "=", ",", "9", "99999", "x", "y"),
    *(r"\pi", r"\sum_{k=1}^{9}", r"\int_0^{9}", r"\sin", r"\log", "**", r"\left(", r"\right)", "\n", "\0", " ", "∞"),
    *("½", "é", "\\", "import os", "eval(", "'", '"', "$", "#", "%", "&", r"\text{a}", "10^{", "[", "]", "|", "<", ">"),
)


def answers(count: int, seed: int = 0) -> Iterator[str]:
    """Yields ``count`` responses: the fixed ones first, then random ones."""
    generator = random.Random(seed)
    for number in range(count):
        random_text = "".join(generator.choices(_PIECES, k=generator.randint(1, 40)))
        text = FIXED[number] if number < len(FIXED) else random_text
        yield f"So it is.\nAnswer: {text}" if number % 2 else f"Then \\boxed{{{text}}}"
