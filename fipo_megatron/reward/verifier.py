"""Verifiers by name."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
from pathlib import Path

from fipo_megatron.config import RewardConfig
from fipo_megatron.config.urls import url_problem
from fipo_megatron.reward.child_verifier import ChildVerifier
from fipo_megatron.reward.http_verifier import HttpVerifier
from fipo_megatron.reward.verifier_protocol import Verifier
from fipo_megatron.storage.json_files import one_line

_VALID = "math, exact, python:MODULE.FUNCTION, or a URL that begins with http: or https:"
_DYNAMIC = {"*", "__getattr__", "exec", "globals", "setattr", "vars"}
"""Names in a module that may define functions which its source does not name."""


def check_verifier(name: str) -> None:
    """Checks the name of a verifier without running it, its module or a process.

    Raises:
        ValueError: The name is invalid; the message says what is valid.
    """
    if name in ("math", "exact"):
        return
    if name.startswith("python:"):
        _check_function(name)
    elif name.startswith(("http:", "https:")):
        if problem := url_problem(name):
            raise ValueError(f"reward.verifier = {name}: {problem}; valid: {_VALID}")
    else:
        raise ValueError(f"reward.verifier = {name}: must be {_VALID}")


def _check_function(name: str) -> None:
    """Raises ValueError if there is no such module, or its source never binds the function's name."""
    module, _, function = name.removeprefix("python:").rpartition(".")
    spec = None
    with contextlib.suppress(Exception):  # a parent package, which is imported, may raise anything
        spec = importlib.util.find_spec(module) if function.isidentifier() and module else None
    if spec is None:
        raise ValueError(f"reward.verifier = {name}: there is no module {module!r} to import; valid: {_VALID}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # no source: a missing function is found with the first answer
    try:
        bound, used = _names(ast.parse(Path(spec.origin).read_bytes()))
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"reward.verifier = {name}: {spec.origin} cannot be read: {one_line(error)}") from None
    if function not in bound and not (bound | used) & _DYNAMIC:
        near = difflib.get_close_matches(function, bound, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"reward.verifier = {name}: {spec.origin} defines no {function!r}{hint}")


def _names(source: ast.Module) -> tuple[set[str], set[str]]:
    """Returns the names that a module binds anywhere, and those that it uses."""
    bound: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name):
            (bound if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
    return bound, used


def open_verifier(config: RewardConfig) -> Verifier:
    """Returns the verifier that the configuration names. It starts processes with the first answer.

    Raises:
        ValueError: The name is invalid; see :func:`check_verifier`.
    """
    check_verifier(config.verifier)
    if config.verifier.startswith(("http:", "https:")):
        return HttpVerifier(config.verifier, config.verifier_processes, config.verifier_seconds)
    return ChildVerifier(
        config.verifier,
        config.verifier_processes,
        config.verifier_seconds,
        config.verifier_memory_mib,
        config.thinking_end,
    )
