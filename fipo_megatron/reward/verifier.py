"""Verifiers by name."""

from __future__ import annotations

import contextlib
import importlib.util
from urllib.parse import urlparse

from fipo_megatron.config import RewardConfig
from fipo_megatron.reward.child_verifier import ChildVerifier
from fipo_megatron.reward.http_verifier import HttpVerifier
from fipo_megatron.reward.verifier_protocol import Verifier

_VALID = "math, exact, python:MODULE.FUNCTION, or a URL that begins with http: or https:"


def check_verifier(name: str) -> None:
    """Checks the name of a verifier without importing or starting anything.

    Raises:
        ValueError: The name is invalid; the message says what is valid.
    """
    if name in ("math", "exact"):
        return
    if name.startswith("python:"):
        module, _, function = name.removeprefix("python:").rpartition(".")
        with contextlib.suppress(ImportError, ValueError):
            if function.isidentifier() and module and importlib.util.find_spec(module) is not None:
                return
        raise ValueError(f"reward.verifier = {name}: there is no module {module!r} to import; valid: {_VALID}")
    if name.startswith(("http:", "https:")) and urlparse(name).netloc:
        return
    raise ValueError(f"reward.verifier = {name}: must be {_VALID}")


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
