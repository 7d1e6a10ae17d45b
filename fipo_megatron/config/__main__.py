"""Prints the complete configuration, and notes about it on stderr; exit code 2 if it is not valid.

fipo config examples/configs/fipo_qwen2.5_32b.yaml rollout.max_response_tokens=16384
fipo config CONFIG --value run.output

With --value KEY, prints the value of one key and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from fipo_megatron.config.checks import notices
from fipo_megatron.config.files import ConfigError, as_dict, load_config


def main(arguments: Sequence[str]) -> int:
    """Loads a configuration and prints it; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    arguments, key = _take_key(arguments)
    try:
        config = load_config(arguments[0], arguments[1:])
        if key is not None:
            print(_value(as_dict(config), key))
            return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(yaml.safe_dump(as_dict(config), sort_keys=False), end="")
    for notice in notices(config):
        print(f"note: {notice}", file=sys.stderr)
    return 0


def _take_key(arguments: Sequence[str]) -> tuple[Sequence[str], str | None]:
    """Returns the arguments without ``--value KEY``, and the key; None without it."""
    if "--value" not in arguments[:-1]:
        return arguments, None
    at = arguments.index("--value")
    return [*arguments[:at], *arguments[at + 2 :]], arguments[at + 1]


def _value(values: Any, key: str) -> str:
    """Returns the value of a dotted key: text as it is, anything else as JSON.

    Raises:
        ConfigError: there is no such key.
    """
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            raise ConfigError(f"--value {key}: no such key; see docs/configuration.md")
        values = values[part]
    return values if isinstance(values, str) else json.dumps(values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
