"""``fipo compare shift CONFIG …``: what RL changed, token by token."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

KINDS = {
    "shift": ("fipo_megatron.compare.shift", "compare two models at every position of responses"),
    "swap": ("fipo_megatron.compare.swap", "replace selected tokens of one model by those of the other"),
}
"""Module and summary of each kind of comparison. The module has ``main(arguments) -> int``."""


def main(arguments: Sequence[str]) -> int:
    """Runs a comparison and returns its exit code."""
    kind, *rest = arguments or [""]
    if kind in KINDS:
        code: int = importlib.import_module(KINDS[kind][0]).main(rest)
        return code
    lines = [f"  fipo compare {name} CONFIG [key=value ...]  {summary}" for name, (_, summary) in KINDS.items()]
    print("\n".join(["usage:", *lines]), file=sys.stdout if kind in ("-h", "--help") else sys.stderr)
    return 0 if kind in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
